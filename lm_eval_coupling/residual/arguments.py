"""What a block was called with beside the stream. Blocks that are given the same share it, and what is cut from it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_eval_coupling.residual import argument

KEPT = 64  # runs on some tokens whose arguments are remembered, and their indices
_NUMBERS = itertools.count()


class Arguments:
    """The arguments of one block's call, freed of side effects.

    Attributes:
        args: without a name, in order.
        kwargs: by name.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._number = next(_NUMBERS)  # never given again, as an id may be
        self._of_prompts: dict[tuple[int, int, int], Arguments] = {}
        self._at_tokens: dict[Any, Arguments] = {}

    @classmethod
    def replayable(cls, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """As they were when the block was called: replaying must neither fill a cache nor see what came later."""
        named = {name: argument.replayable(name, value) for name, value in kwargs.items()}
        return cls(tuple(argument.replayable("", value) for value in args), named)

    def same_as(self, other: Arguments) -> bool:
        """Whether both are the same numbers and the same pieces of memory."""
        return argument.the_same(
            (self.args, *self.kwargs.items()), (other.args, *other.kwargs.items())
        )

    def in_dtype(self, dtype: torch.dtype) -> Arguments:
        """With every floating-point tensor in ``dtype``."""
        return Arguments(argument.in_dtype(self.args, dtype), argument.in_dtype(self.kwargs, dtype))

    def of_prompt(self, prompt: int, seq: int, padded: int) -> Arguments:
        """For one of a batch of prompts, ``padded`` tokens long on the right, as they would be of it alone."""
        if (key := (prompt, seq, padded)) not in self._of_prompts:
            self._of_prompts[key] = self._each(
                lambda name, value: argument.of_prompt(name, value, *key)
            )
        return self._of_prompts[key]

    def one_row(self, token: int, seq: int) -> Arguments:
        """Masks cut to the row of one query."""
        return self._each(lambda name, value: argument.cut_row(value, token, seq))

    @staticmethod
    def at_tokens(
        each: Sequence[Arguments], tokens: Sequence[int], seqs: Sequence[int], firsts: Sequence[int]
    ) -> Arguments:
        """For one run on a token of each prompt, which sees that prompt's keys from a first one on.

        Args:
            each: the arguments of every prompt's call.
            tokens: by prompt.
            seqs: numbers of tokens of the prompts.
            firsts: the first keys that are seen, by prompt.

        Returns:
            Those of all prompts, joined.

        Raises:
            ValueError: if they cannot be joined.
        """
        known, key = (
            each[0]._at_tokens,
            (tuple(one._number for one in each), *map(tuple, (tokens, seqs, firsts))),
        )
        if key not in known:
            _make_room(known)
            alone = [of._at(*at) for of, *at in zip(each, tokens, seqs, firsts, strict=True)]
            known[key] = Arguments._joined(alone)
        return known[key]

    def _at(self, token: int, seq: int, first: int) -> Arguments:
        return self._each(lambda name, value: argument.cut(name, value, token, seq, first))

    @staticmethod
    def _joined(alone: Sequence[Arguments]) -> Arguments:
        args = tuple(
            argument.joined(values) for values in zip(*(one.args for one in alone), strict=True)
        )
        return Arguments(
            args,
            {
                name: argument.joined([one.kwargs[name] for one in alone], name)
                for name in alone[0].kwargs
            },
        )

    def _each(self, change: Callable[[str, Any], Any]) -> Arguments:
        return Arguments(
            tuple(change("", value) for value in self.args),
            {name: change(name, value) for name, value in self.kwargs.items()},
        )


def _make_room(remembered: dict[Any, Any]) -> None:
    """The oldest goes where there are many."""
    if len(remembered) == KEPT:
        del remembered[next(iter(remembered))]


class OnePass:
    """What the blocks of one pass share: arguments that they are given alike, and indices, which devices wait for."""

    def __init__(self) -> None:
        self._seen: list[Arguments] = []
        # What it was made of is held: its memory is not used again.
        self._brought: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=KEPT)
        self._indices: dict[tuple[Any, torch.device], Tensor] = {}

    def indices(self, key: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, on the device; made and brought there once for each ``key``."""
        if (key, device) not in self._indices:
            _make_room(self._indices)
            self._indices[key, device] = make().to(device)
        return self._indices[key, device]

    def rows(self, of: Sequence[int], device: torch.device) -> Int[Tensor, " row"]:
        """Whole numbers as indices."""
        return self.indices(tuple(of), device, lambda: torch.tensor(of))

    def brought(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on the device: one that several blocks are given alike is brought there once."""
        if tensor.device == device:
            return tensor
        for seen, version, there in self._brought:
            if (
                there.device == device
                and version == tensor._version
                and argument.the_same(seen, tensor)
            ):
                return there
        there = tensor.to(device)
        self._brought.append((tensor, tensor._version, there))
        return there

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call, or the same ones of a block before."""
        new = Arguments.replayable(args, kwargs)
        found = next((seen for seen in reversed(self._seen) if new.same_as(seen)), None)
        if found is None:
            self._seen.append(new)
        return found or new
