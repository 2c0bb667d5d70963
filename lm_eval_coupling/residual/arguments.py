"""Everything that a block was called with beside the stream: cut to a token, joined, shared."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

# "cache" since transformers 5.24
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
KEPT = 64  # runs on some tokens whose arguments are remembered, and their indices

_MAPPINGS = (dict, UserDict)
_numbers = itertools.count()


class Arguments:
    """The arguments of one block's call, freed of side effects.

    Attributes:
        args: unnamed ones, in order.
        kwargs: named ones.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._number = next(_numbers)  # never given again, as an id may be
        self._of_prompts: dict[tuple[int, int, int], Arguments] = {}
        self._at_tokens: dict[Any, Arguments] = {}

    @classmethod
    def replayable(cls, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """Copy a call's arguments so that replaying neither fills a cache nor sees later blocks."""
        named = {name: _replayable(name, value) for name, value in kwargs.items()}
        return cls(tuple(_replayable("", value) for value in args), named)

    def is_same(self, other: Arguments) -> bool:
        """Return whether both hold the same numbers and the same pieces of memory."""
        mine, theirs = ((a.args, *a.kwargs.items()) for a in (self, other))
        return _is_same(mine, theirs)

    def in_dtype(self, dtype: torch.dtype) -> Arguments:
        """Cast every floating-point tensor to ``dtype``."""
        return Arguments(in_dtype(self.args, dtype), in_dtype(self.kwargs, dtype))

    def of_prompt(self, prompt: int, seq: int, padded: int) -> Arguments:
        """Cut the arguments of a batch, ``padded`` tokens long, to one prompt of ``seq`` tokens."""
        if (key := (prompt, seq, padded)) not in self._of_prompts:
            self._of_prompts[key] = self._each(
                lambda name, tensor: _cut_to_prompt(name, tensor, *key)
            )
        return self._of_prompts[key]

    def one_row(self, token: int, seq: int) -> Arguments:
        """Cut masks to the row of one query."""

        def cut(name: str, value: Any) -> Any:
            is_square = isinstance(value, Tensor) and value.dim() >= 2
            if is_square and value.shape[-2:] == (seq, seq):
                return value[..., token : token + 1, :]
            return value

        named = {name: cut(name, value) for name, value in self.kwargs.items()}
        return Arguments(tuple(cut("", value) for value in self.args), named)

    def at_token(self, token: int, seq: int, first_key: int) -> Arguments:
        """Cut the arguments to one token of ``seq``, which sees the keys from a first one on."""
        return self._each(
            lambda name, tensor: _cut_to_token(name, tensor, token, seq, first_key), inside="keys"
        )

    def _each(self, change: Callable[[str, Tensor], Tensor], inside: str = "") -> Arguments:
        return Arguments(
            tuple(_each_tensor(value, change, "", inside) for value in self.args),
            {name: _each_tensor(v, change, name, inside) for name, v in self.kwargs.items()},
        )


def join_at_tokens(
    prompts: Sequence[Arguments],
    tokens: Sequence[int],
    seqs: Sequence[int],
    first_keys: Sequence[int],
) -> Arguments:
    """Return the arguments of several prompts joined for one run on a token of each.

    They are remembered for later runs.

    Args:
        prompts: the arguments of every prompt's call.
        tokens: the token of each.
        seqs: numbers of tokens of the prompts.
        first_keys: the first key that each token sees.

    Raises:
        ValueError: if they cannot be joined.
    """
    remembered = prompts[0]._at_tokens
    key = (tuple(p._number for p in prompts), tuple(tokens), tuple(seqs), tuple(first_keys))
    if key not in remembered:
        _make_room(remembered)
        cut = [
            arguments.at_token(*place)
            for arguments, *place in zip(prompts, tokens, seqs, first_keys, strict=True)
        ]
        args = tuple(_join(values) for values in zip(*(a.args for a in cut), strict=True))
        names = cut[0].kwargs
        remembered[key] = Arguments(
            args, {name: _join([a.kwargs[name] for a in cut], name) for name in names}
        )
    return remembered[key]


class SharedArguments:
    """Equal arguments of the blocks of one pass, and indices, which devices wait for."""

    def __init__(self) -> None:
        self._seen: list[Arguments] = []
        # The source is held with its copy: its memory is not used again meanwhile.
        self._moved: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=KEPT)
        self._indices: dict[tuple[Any, torch.device], Tensor] = {}

    def indices(self, key: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` gives, on the device; made once for each ``key``."""
        if (key, device) not in self._indices:
            _make_room(self._indices)
            self._indices[key, device] = make().to(device)
        return self._indices[key, device]

    def rows(self, numbers: Sequence[int], device: torch.device) -> Int[Tensor, " row"]:
        """Return whole numbers as indices on the device."""
        return self.indices(tuple(numbers), device, lambda: torch.tensor(numbers))

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Move a tensor to the device, once for all blocks that are given it."""
        if tensor.device == device:
            return tensor
        for source, version, moved in self._moved:
            if moved.device == device and version == tensor._version and _is_same(source, tensor):
                return moved
        moved = tensor.to(device)
        self._moved.append((tensor, tensor._version, moved))
        return moved

    def share(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of a call, or the equal ones of an earlier block."""
        arguments = Arguments.replayable(args, kwargs)
        for seen in reversed(self._seen):
            if arguments.is_same(seen):
                return seen
        self._seen.append(arguments)
        return arguments


def _make_room(remembered: dict[Any, Any]) -> None:
    """Forget the oldest entry of a full dictionary."""
    if len(remembered) == KEPT:
        del remembered[next(iter(remembered))]


def _cut_to_token(name: str, value: Tensor, t: int, n: int, first: int) -> Tensor:
    """Cut a tensor to position ``t`` of ``n``: the only table about block arguments.

    Returns:
        A view; what does not go by tokens is returned itself.
    """
    if name == "position_embeddings":
        return value[..., t : t + 1, :]
    if name in ("position_ids", "cache_position"):
        return value[..., t : t + 1]
    if name in ("alibi", "position_bias"):
        # Attention weights do not change with a common shift.
        return value[..., -1:] if first == t else value[..., first : t + 1]
    if name == "keys":
        return value[..., first : t + 1, :] if value.dim() > 2 and value.shape[-2] == n else value
    if value.dim() >= 2 and value.shape[-2:] == (n, n):
        return value[..., t : t + 1, first : t + 1]
    if value.dim() == 3 and value.shape[1] == n:
        # A vector for every token, such as Gemma's embeddings of each layer.
        return value[:, t : t + 1]
    return value


def _cut_to_prompt(name: str, value: Tensor, prompt: int, seq: int, padded: int) -> Tensor:
    if value.dim() > 1 and value.shape[0] > 1:
        value = value[prompt : prompt + 1]
    if name == "position_embeddings":
        return value[..., :seq, :]
    if name in ("position_ids", "cache_position"):
        return value[..., :seq]
    if value.dim() >= 2 and value.shape[-2:] == (padded, padded):
        return value[..., :seq, :seq]
    return value


def _join(values: Sequence[Any], name: str = "") -> Any:
    """Join the same argument of several calls: stacked where it differs."""
    first = values[0]
    # A cache position tells a cache where to write, in transformers below 5.4.
    if len(values) == 1 or name == "cache_position":
        return first
    if isinstance(first, tuple | list):
        return type(first)(_join(items) for items in zip(*values, strict=True))
    if isinstance(first, _MAPPINGS):
        raise ValueError("calls that are handed objects of other blocks cannot be joined")
    if isinstance(first, Tensor):
        if first.dim() > 1 and first.shape[0] == 1:
            return torch.cat(_equally_long(values))
        are_equal = all(_is_same_view(v, first) or torch.equal(v, first) for v in values)
    else:
        are_equal = all(value == first for value in values)
    if not are_equal:
        raise ValueError("calls with different arguments cannot be joined")
    return first


def _equally_long(masks: Sequence[Tensor]) -> list[Tensor]:
    """Put unseen keys in front of masks that have fewer keys than the longest one."""
    longest = max(mask.shape[-1] for mask in masks)
    missing = [longest - mask.shape[-1] for mask in masks]
    if not any(missing):
        return list(masks)
    dtype = masks[0].dtype
    if not (dtype.is_floating_point or dtype == torch.bool):
        raise ValueError(f"masks of {dtype} cannot be joined")
    unseen = torch.finfo(dtype).min if dtype.is_floating_point else False
    return [
        F.pad(mask, (before, 0), value=unseen) for mask, before in zip(masks, missing, strict=True)
    ]


def _is_same(a: Any, b: Any) -> bool:
    """Return whether nested arguments hold the same numbers, texts and pieces of memory.

    Containers that blocks write to are never the same. Nothing is asked of the device.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _is_same_view(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, str | bool | int | float):
        return type(a) is type(b) and a == b
    return a is b and not isinstance(a, _MAPPINGS)


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether both are the same view of the same memory."""
    if a is b or not a.layout == b.layout == torch.strided or a.is_nested or b.is_nested:
        return a is b
    return _view(a) == _view(b) and a.data_ptr() == b.data_ptr()


def _view(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.device, t.shape, t.stride(), t.is_conj(), t.is_neg()


def _replayable(name: str, value: Any) -> Any:
    """Copy one argument for a replay: no cache, detached tensors, copied containers."""
    # Objects that blocks hand on to each other (Gemma 4's shared keys) are copied down to their
    # tensors, which are held fixed.
    if name in CACHES:
        return None
    return False if name == "use_cache" else detached(value)


def detached(value: Any) -> Any:
    """Return nested containers around detached tensors, without copying numbers."""
    return _each_tensor(value, lambda _, tensor: tensor.detach())


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return nested containers with every floating-point tensor in ``dtype``."""
    return _each_tensor(
        value, lambda _, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )


def _each_tensor(
    value: Any, change: Callable[[str, Tensor], Tensor], name: str = "", inside: str = ""
) -> Any:
    """Copy nested containers around changed tensors; anything else is passed on."""
    # ``name`` is the argument's; tensors in mappings, which blocks hand on, are named ``inside``.
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, tuple | list):
        items = [_each_tensor(item, change, name, inside) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, _MAPPINGS):
        mapping = copy.copy(value)
        for key, item in value.items():
            mapping[key] = _each_tensor(item, change, inside, inside)
        return mapping
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in nested arguments."""
    if isinstance(value, UserDict):
        value = value.data
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
