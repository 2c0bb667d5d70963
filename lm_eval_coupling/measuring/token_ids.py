"""Token ids of prompts given as texts, ids, tensors or the output of a tokenizer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

from lm_eval_coupling.errors import CouplingError

EXPECTED = (
    "texts or token ids: a list of strings, lists or tensors of ids, a tensor [prompt, seq] "
    "or a tokenizer's output"
)


def token_ids(model: Any, prompts: Any) -> list[Sequence[int]]:
    """Return the token ids of every prompt, in order.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`, which encodes texts.
        prompts: one text or several; ids of one prompt or of several as lists, arrays or tensors;
            or the output of a tokenizer, whose ``attention_mask`` tells ids from padding. Pixel
            values are encoded by the model, too.

    Raises:
        CouplingError: for anything else, and for a text without a tokenizer.
    """
    if isinstance(prompts, str):
        return [model.encode(prompts)]
    if isinstance(prompts, Mapping):
        return _from_tokenizer(prompts)
    if _are_pixels(prompts):
        return (
            [model.encode(prompts)]
            if prompts.ndim == 3
            else [model.encode(image) for image in prompts]
        )
    plain = _plain(prompts)
    if not isinstance(plain, Iterable) or isinstance(plain, bytes | bytearray | Set):
        raise CouplingError(f"got prompts={prompts!r}, expected {EXPECTED}")
    plain = list(plain)
    if plain and all(_is_id(value) for value in plain):
        return [[operator.index(value) for value in plain]]
    return [
        model.encode(prompt) if isinstance(prompt, str) or _are_pixels(prompt) else _ids(prompt)
        for prompt in plain
    ]


def _are_pixels(prompt: Any) -> bool:
    return isinstance(prompt, Tensor) and prompt.is_floating_point() and prompt.ndim in (3, 4)


def _from_tokenizer(output: Mapping[str, Any]) -> list[Sequence[int]]:
    if "input_ids" not in output:
        raise CouplingError(
            f"got prompts with {', '.join(map(str, output)) or 'nothing'}, expected input_ids; "
            f"or {EXPECTED}"
        )
    ids = _plain(output["input_ids"])
    mask = _plain(output.get("attention_mask"))
    if ids and _is_id(ids[0]):
        ids, mask = [ids], None if mask is None else [mask]
    rows = [_ids(row) for row in ids]
    if mask is None:
        return rows
    if [*map(len, rows)] != [len(row) if isinstance(row, list | tuple) else -1 for row in mask]:
        raise CouplingError(
            "got prompts whose attention_mask has another shape than input_ids, "
            "expected one number for each id"
        )
    return [
        [i for i, kept in zip(row, row_mask, strict=True) if kept]
        for row, row_mask in zip(rows, mask, strict=True)
    ]


def _ids(prompt: Any) -> Sequence[int]:
    if (
        isinstance(prompt, Sequence)
        and type(prompt) not in (list, tuple, str)
        and all(map(_is_id, prompt))
    ):
        return prompt  # Encoded already; its type may carry more than the numbers.
    plain = _plain(prompt)
    if isinstance(plain, list | tuple) and len(plain) == 1 and isinstance(plain[0], list | tuple):
        plain = plain[0]  # [1, seq], the input of a model
    if not isinstance(plain, list | tuple) or not all(_is_id(value) for value in plain):
        raise CouplingError(
            f"got a prompt {str(prompt)[:80]!r} of {type(prompt).__name__}, expected {EXPECTED}"
        )
    return [operator.index(value) for value in plain]


def _plain(value: Any) -> Any:
    """Return tensors and arrays as nested lists."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def _is_id(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point() and value.dtype.itemsize > 1
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
