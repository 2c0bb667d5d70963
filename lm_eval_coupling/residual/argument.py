"""One argument of a block: cut to one token or one prompt, joined for several calls, and freed of side effects."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

CACHES = (
    "past_key_values",
    "past_key_value",
    "layer_past",
    "cache",
)  # "cache" since transformers 5.24


def cut(name: str, value: Any, t: int, n: int, first: int) -> Any:
    """Cut one argument of a block down to position ``t`` of ``n``, which sees the keys from ``first`` on.

    The only table about block arguments.

    Returns:
        A view where it is cut; what does not go by tokens is handed back as it is.
    """
    return _each_tensor(
        value, lambda name, tensor: _cut(name, tensor, t, n, first), name, inside="keys"
    )


def _cut(name: str, value: Tensor, t: int, n: int, first: int) -> Tensor:
    if name == "position_embeddings":
        return value[..., t : t + 1, :]
    if name in ("position_ids", "cache_position"):
        return value[..., t : t + 1]
    if name in ("alibi", "position_bias"):
        return (
            value[..., -1:] if first == t else value[..., first : t + 1]
        )  # weights do not change with a common shift
    if name == "keys":
        return value[..., first : t + 1, :] if value.dim() > 2 and value.shape[-2] == n else value
    if value.dim() >= 2 and value.shape[-2:] == (n, n):
        return value[..., t : t + 1, first : t + 1]
    if value.dim() == 3 and value.shape[1] == n:
        return value[
            :, t : t + 1
        ]  # something of every token, such as Gemma's embeddings of each layer
    return value


def cut_row(value: Any, t: int, n: int) -> Any:
    """Masks cut to the row of query ``t``."""
    square = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-2:] == (n, n)
    return value[..., t : t + 1, :] if square else value


def of_prompt(name: str, value: Any, prompt: int, seq: int, padded: int) -> Any:
    """One argument of a call with a batch of prompts, ``padded`` tokens long on the right, as it is for one of them."""
    return _each_tensor(
        value, lambda name, tensor: _of_prompt(name, tensor, prompt, seq, padded), name
    )


def _of_prompt(name: str, value: Tensor, prompt: int, seq: int, padded: int) -> Tensor:
    if value.dim() > 1 and value.shape[0] > 1:
        value = value[prompt : prompt + 1]
    if name == "position_embeddings":
        return value[..., :seq, :]
    if name in ("position_ids", "cache_position"):
        return value[..., :seq]
    if value.dim() >= 2 and value.shape[-2:] == (padded, padded):
        return value[..., :seq, :seq]
    return value


def joined(values: Sequence[Any], name: str = "") -> Any:
    """The same argument of several calls as one: stacked where it differs."""
    first = values[0]
    if (
        len(values) == 1 or name == "cache_position"
    ):  # which tells a cache where to write, in transformers below 5.4
        return first
    if isinstance(first, (tuple, list)):
        return type(first)(joined(items) for items in zip(*values, strict=True))
    if isinstance(first, _MAPPINGS):
        raise ValueError("calls that are handed objects of other blocks cannot be joined")
    if not isinstance(first, Tensor):
        if any(value != first for value in values):
            raise ValueError("calls with different arguments cannot be joined")
        return first
    if first.dim() > 1 and first.shape[0] == 1:
        return torch.cat(_equally_long(values))
    if any(not _one_memory(value, first) and not torch.equal(value, first) for value in values):
        raise ValueError("calls with different arguments cannot be joined")
    return first


def the_same(a: Any, b: Any) -> bool:
    """Whether nested arguments hold the same numbers, texts and pieces of memory.

    Returns:
        False for containers that blocks write to, whatever is in them. Nothing is asked of the device.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _one_memory(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(the_same, a, b))
    if isinstance(a, (str, bool, int, float)):
        return type(a) is type(b) and a == b
    return a is b and not isinstance(a, _MAPPINGS)


def _one_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same view of the same memory; of what has none to show, whether they are one object."""
    if a is b or not a.layout == b.layout == torch.strided or a.is_nested or b.is_nested:
        return a is b
    return all(of(a) == of(b) for of in _VIEW) and a.data_ptr() == b.data_ptr()


_VIEW: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.dtype,
    lambda t: t.device,
    lambda t: t.shape,
    Tensor.stride,
    Tensor.is_conj,
    Tensor.is_neg,
)


def _equally_long(masks: Sequence[Tensor]) -> list[Tensor]:
    """Arguments as they are, masks of different numbers of keys with as many each: those put in front are not to be seen."""
    longest = max(mask.shape[-1] for mask in masks)
    missing = [longest - mask.shape[-1] for mask in masks]
    if not any(missing):
        return list(masks)
    if not (masks[0].is_floating_point() or masks[0].dtype == torch.bool):
        raise ValueError(f"masks of {masks[0].dtype} cannot be joined")
    unseen = torch.finfo(masks[0].dtype).min if masks[0].is_floating_point() else False
    return [
        F.pad(mask, (before, 0), value=unseen) for mask, before in zip(masks, missing, strict=True)
    ]


def replayable(name: str, value: Any) -> Any:
    """A block argument as it was when the block was called: replaying must neither fill a cache nor see what came later.

    Objects that blocks hand on to each other (Gemma 4's shared keys and values) are copied down to their tensors, which are
    held fixed; what is no number, text, tensor or container of such things is handed over as it is.

    Returns:
        None in place of a cache, False for ``use_cache``, else a copy of the containers over detached tensors.
    """
    if name in CACHES:
        return None
    if name == "use_cache":
        return False
    return carried(value)


def carried(value: Any) -> Any:
    """A copy of what one block hands to another, without copying tensors."""
    return _each_tensor(value, lambda _, tensor: tensor.detach())


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with every floating-point tensor in ``dtype``."""
    return _each_tensor(
        value, lambda _, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )


def _each_tensor(
    value: Any, function: Callable[[str, Tensor], Tensor], name: str = "", inside: str = ""
) -> Any:
    """The same containers, around what becomes of their tensors; whatever else is in them is handed over as it is."""
    # name: of the argument; inside: for what is in objects that blocks hand on to each other.
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, (tuple, list)):
        items = [_each_tensor(item, function, name, inside) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, _MAPPINGS):
        return _mapped(value, lambda item: _each_tensor(item, function, inside, inside))
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, UserDict):
        value = value.data
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


_MAPPINGS = (dict, UserDict)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    new = copy.copy(value)
    for key, item in value.items():
        new[key] = function(item)
    return new
