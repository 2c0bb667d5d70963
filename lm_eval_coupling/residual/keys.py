"""Keys and values that a block hands to its cache, kept to run one token of a prompt again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lm_eval_coupling.residual.arguments import SharedArguments, in_dtype

Pair = tuple[Tensor, Tensor]  # keys and values, [prompt, …, seq, d_head] each


class Cache:
    """A stand-in for a block's cache: keeps keys and values, or puts kept ones before others."""

    def __init__(self, kept: Pair | None = None) -> None:
        self.kept = kept
        self.given: Pair | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Return the keys and values to attend to; a block calls this."""
        if self.kept is not None:
            keys, values = self.kept
            return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)
        self.given = (key.detach(), value.detach())
        return key, value


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys and values of one prompt of ``seq`` tokens, within the batch of one pass."""

    batch: Pair
    prompt: int
    seq: int
    shared: SharedArguments = dataclasses.field(default_factory=SharedArguments)

    def in_dtype(self, dtype: torch.dtype) -> Keys:
        """Cast this prompt's keys and values to ``dtype``."""
        return Keys(in_dtype(tuple(map(self.cut, self.batch)), dtype), 0, self.seq)

    def cut(self, batch: Tensor) -> Float[Tensor, "1 *head seq d_head"]:
        """Cut this prompt out of keys, or of values, of the whole batch."""
        return batch[self.prompt : self.prompt + 1, ..., : self.seq, :]


def cache_before(keys: Sequence[Keys], tokens: Sequence[int]) -> Cache:
    """Return a cache of the tokens before the given one of every prompt.

    Shorter prompts have others' keys in front of their own, which masks hide.
    """
    if all(k.batch is keys[0].batch for k in keys):
        rows = tuple(k.prompt for k in keys)
        keys_, values = (
            _gather(part, rows, tuple(tokens), keys[0].shared) for part in keys[0].batch
        )
    else:
        keys_, values = (_pad([k.cut(k.batch[i]) for k in keys], tokens) for i in (0, 1))
    return Cache((keys_, values))


def _pad(parts: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    longest = max(tokens)
    before = [part[..., :token, :] for part, token in zip(parts, tokens, strict=True)]
    return torch.cat([F.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in before])


def _gather(
    batch: Tensor, rows: tuple[int, ...], tokens: tuple[int, ...], shared: SharedArguments
) -> Tensor:
    """Gather the places before each token, in one step for all prompts of a batch."""
    longest, device = max(tokens), batch.device
    chosen = batch[..., :longest, :]
    if rows != tuple(range(len(batch))):
        chosen = chosen[shared.rows(rows, device)]
    if len(set(tokens)) == 1:
        return chosen
    places = shared.indices(("before", tokens), device, lambda: _places_before(tokens))
    places = places.view(len(rows), *[1] * (chosen.dim() - 3), longest, 1)
    return chosen.gather(-2, places.expand(*chosen.shape[:-2], longest, chosen.shape[-1]))


def _places_before(tokens: tuple[int, ...]) -> Int[Tensor, "prompt longest"]:
    """Return the places before each token, the last place last; 0 where there are none left."""
    return (torch.arange(max(tokens)) - max(tokens) + torch.tensor(tokens)[:, None]).clamp(min=0)
