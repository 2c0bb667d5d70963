"""The keys and values that a block hands to its cache: kept for a batch of prompts, put before those of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lm_eval_coupling.residual.argument import in_dtype
from lm_eval_coupling.residual.arguments import OnePass

Pair = tuple[Tensor, Tensor]  # keys and values, [prompt, …, seq, d_head] each


class Cache:
    """In place of a block's key-value cache: keeps the keys and values that it is given, or puts some before them."""

    def __init__(self, kept: Pair | None = None) -> None:
        self.kept = kept
        self.given: Pair | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """What a block calls: the keys and values that it is to attend to."""
        if self.kept is not None:
            keys, values = self.kept
            return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)
        self.given = (key.detach(), value.detach())
        return key, value


@dataclasses.dataclass(frozen=True)
class Keys:
    """Those of one prompt, ``seq`` tokens long, in the batch of one pass."""

    batch: Pair
    prompt: int
    seq: int
    shared: OnePass = dataclasses.field(default_factory=OnePass)

    def in_dtype(self, dtype: torch.dtype) -> Keys:
        """The same keys and values in another dtype, of this prompt alone."""
        return Keys(in_dtype(tuple(map(self._own, self.batch)), dtype), 0, self.seq)

    def _own(self, of_all: Tensor) -> Float[Tensor, "1 *head seq d_head"]:
        return of_all[self.prompt : self.prompt + 1, ..., : self.seq, :]

    @staticmethod
    def before_each(keys: Sequence[Keys], tokens: Sequence[int]) -> Cache:
        """A cache that holds those of the tokens before the given one of every prompt; shorter ones after others' unseen."""
        if all(one.batch is keys[0].batch for one in keys):
            rows = tuple(one.prompt for one in keys)
            parts = [
                _before_each(of_all, rows, tuple(tokens), keys[0].shared)
                for of_all in keys[0].batch
            ]
        else:
            parts = [_joined([one._own(one.batch[i]) for one in keys], tokens) for i in (0, 1)]
        return Cache((parts[0], parts[1]))


def _joined(own: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    longest = max(tokens)
    before = [kept[..., :token, :] for kept, token in zip(own, tokens, strict=True)]
    return torch.cat([F.pad(kept, (0, 0, longest - kept.shape[-2], 0)) for kept in before])


def _before_each(
    of_all: Tensor, rows: tuple[int, ...], tokens: tuple[int, ...], shared: OnePass
) -> Tensor:
    """In one step for all prompts of a batch."""
    longest, device = max(tokens), of_all.device
    chosen = of_all[..., :longest, :]
    if rows != tuple(range(len(of_all))):
        chosen = chosen[shared.rows(rows, device)]
    if len(set(tokens)) == 1:
        return chosen
    at = shared.indices(("before", tokens), device, lambda: _ending_at(tokens))
    at = at.view(len(rows), *[1] * (chosen.dim() - 3), longest, 1)
    return chosen.gather(-2, at.expand(*chosen.shape[:-2], longest, chosen.shape[-1]))


def _ending_at(tokens: tuple[int, ...]) -> Int[Tensor, "prompt longest"]:
    """Positions before each token, the last of them last; 0 where there are none left."""
    return (torch.arange(max(tokens)) - max(tokens) + torch.tensor(tokens)[:, None]).clamp(min=0)
