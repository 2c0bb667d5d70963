"""The record of one forward pass: every block's call, caught by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.errors import CouplingError, message_of, pass_on_lack_of_memory
from lm_eval_coupling.residual.arguments import CACHES, SharedArguments, detached, tensors_in
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.block_call import BlockCall, gradient, hidden, require_stream
from lm_eval_coupling.residual.keys import Cache, Keys

Direction = Callable[[int, Tensor], Tensor]
"""(layer, vectors of the stream) → u [d_model]"""


@dataclasses.dataclass(frozen=True)
class ResidualTrace:
    """The block calls of one forward pass, and the stream after the last block."""

    calls: tuple[BlockCall, ...]
    resid_final: Float[Tensor, "1 seq d_model"]

    def trajectory(self, token: int) -> Float[Tensor, "layer_plus_1 d_model"]:
        """Return x_t^0 … x_t^L: the stream at one token before and after every block."""
        stream = [call.resid_pre[0, token].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, token]])

    def trajectories(self, tokens: slice) -> Float[Tensor, "token layer_plus_1 d_model"]:
        """Return :meth:`trajectory` of several tokens."""
        stream = [call.resid_pre[0, tokens].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, tokens]], dim=1)


class TracedBlock:
    """A block during a pass: its weights are upcast while it runs, and its call is kept.

    Args:
        block: the block.
        dtype: arithmetic of the pass.
        tokens: lists with a token of each prompt to pull back from.
        direction: pull back along it during the pass.
        shared: what the blocks of this pass have in common.
        cache: keeps the block's keys and values.
    """

    call: BlockCall | None = None
    resid_post: Tensor

    def __init__(
        self,
        block: Block,
        dtype: torch.dtype,
        *,
        tokens: Sequence[Sequence[int]],
        direction: Direction | None,
        shared: SharedArguments,
        cache: Cache | None,
    ) -> None:
        self.block, self.dtype, self.shared, self.cache = block, dtype, shared, cache
        self.tokens, self.direction = tokens, direction
        self.gradients: list[Tensor] = []  # one of all prompts for each list of tokens
        self._open = contextlib.ExitStack()
        self.close = self._open.close

    def enter(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Remember the call, and make its input a leaf where a derivative is wanted (pre-hook)."""
        if self.call is not None:
            raise CouplingError(
                f"got a model that runs block {self.block.layer} more than once, expected a "
                "residual stream"
            )
        move = partial(self.shared.move, device=self.block.device)
        args = tuple(_move_each(value, move) for value in args)
        kwargs = {name: _move_each(value, move) for name, value in kwargs.items()}
        self._open.enter_context(self.block.upcast(self.dtype))
        positional = len(args)
        resid_pre, args, kwargs = self.block.by_name(args, kwargs)
        require_stream(self.block.layer, resid_pre, resid_pre)
        stream = resid_pre.detach()
        arguments = self.shared.share(args, kwargs)
        self.call = BlockCall(self.block, stream, arguments, positional=positional)
        if self.cache is not None:
            kwargs = kwargs | {name: self.cache for name in CACHES if name in kwargs}
        if self.direction is not None and self.tokens:
            stream = self._leaf = stream.clone().requires_grad_(True)
            self._open.enter_context(torch.enable_grad())
        return self.block.as_called(stream, args, kwargs, positional)

    def leave(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Pull back if wanted, and return the output without its history."""
        assert self.call is not None  # it was entered
        require_stream(self.block.layer, self.call.resid_pre, hidden(output))
        if self.direction is not None and self.tokens:
            u = self.direction(self.block.layer, self._leaf)
            for number, tokens in enumerate(self.tokens, 1):
                rows = self.shared.rows(tokens, self._leaf.device)
                at_each, keep = u.expand(len(rows), -1), number < len(self.tokens)
                pulled = gradient(at_each, self._leaf, hidden(output), rows, keep)
                self.gradients.append(pulled)
            del self._leaf
        self._open.close()
        _drop_history((*args, *kwargs.values()))
        self.resid_post = hidden(output).detach()
        if not isinstance(output, tuple | list):
            return self.resid_post
        parts = (self.resid_post, *detached(tuple(output[1:])))
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    def of_prompt(self, prompt: int, seq: int, number: int) -> BlockCall:
        """Return the call of one prompt alone, ``seq`` tokens long.

        Its pullback is that of list ``number`` of the tokens.
        """
        call, row = self.call, slice(prompt, prompt + 1)
        assert call is not None  # the model has run
        arguments = call.arguments
        if len(call.resid_pre) > 1:
            arguments = arguments.of_prompt(prompt, seq, call.seq)
        pullback = None
        if self.gradients:
            pullback = (self.tokens[number][prompt], self.gradients[number][prompt, :seq])
        given = None if self.cache is None else self.cache.given
        return dataclasses.replace(
            call,
            resid_pre=call.resid_pre[row, :seq],
            arguments=arguments,
            resid_post=self.resid_post[row, :seq],
            pullback=pullback,
            keys=None if given is None else Keys(given, prompt, seq, self.shared),
        )


def _move_each(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return an argument of a block with ``move`` applied to every tensor in it.

    Mappings are changed in place, since later blocks see what a block writes into them. A tuple or
    list, with the mappings in it, is copied if one of its tensors moves.
    """
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict | UserDict):
        for key, item in value.items():
            value[key] = _move_each(item, move)
    elif isinstance(value, tuple | list):
        if any(move(tensor) is not tensor for tensor in tensors_in(value)):
            return tree_map_only(Tensor, move, value)
    return value


def _drop_history(arguments: Iterable[Any]) -> None:
    """Detach, in place, what a block has written into mappings for later blocks."""
    for value in arguments:
        if isinstance(value, dict | UserDict):
            for key, item in value.items():
                value[key] = detached(item)


@contextlib.contextmanager
def explain_refused_inputs(arguments: dict[str, Any], first: TracedBlock) -> Iterator[None]:
    """Add what the model was given to an error before its first block.

    Raises:
        CouplingError: for such an error, for example about an image of another size.
        ValueError: as the model raises it after its first block.
        RuntimeError: likewise, and if memory runs out.
        IndexError: likewise.
    """
    try:
        yield
    except CouplingError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        pass_on_lack_of_memory(error)
        if first.call is not None:
            raise
        given = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        )
        raise CouplingError(
            f"got {given}, which the model does not take ({message_of(error, 200)}); expected what "
            "it is made for"
        ) from error
