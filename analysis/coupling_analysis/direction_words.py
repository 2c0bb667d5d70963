"""What the coupled directions say: the vocabulary nearest to the top left singular vectors of every block of one prompt.

A direction u is read through the model's own final norm and head. Singular vectors have no sign, so both are read, and
only the odd part of the logits counts, (logits(u) − logits(−u))/2: what the bias of a norm or a head would say of any
direction drops out. Its largest entries are the words of u, its smallest those of −u.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.numerics.spectra import top_singular

STAYS = 0.5  # share of its words that a direction must keep to count as the same
RANDOM = 4  # sets of random directions that chance is taken from


@dataclasses.dataclass(frozen=True)
class DirectionWords:
    """The words of one prompt's directions.

    ``ids``: token ids [layer rank 2 word], nearest first, of u and of −u. ``kept``: [layer later rank 2], the share of a
    direction's words that the most similar direction of another layer has, among all its ``rank`` and both signs.
    ``singular_values``: [layer rank].
    """

    ids: np.ndarray
    kept: np.ndarray
    singular_values: np.ndarray

    @property
    def life(self) -> np.ndarray:
        """Int[layer rank 2]: for how many layers in a row after its own at least STAYS of a direction's words are there."""
        layers = len(self.ids)
        lives = np.zeros(self.ids.shape[:3], dtype=int)
        for layer in range(layers):
            stays = self.kept[layer, layer + 1 :] >= STAYS
            lives[layer] = np.logical_and.accumulate(stays, axis=0).sum(axis=0)
        return lives


def direction_words(
    model: Any, tokens: Sequence[int], *, position: int = -1, rank: int = 10, words: int = 10
) -> DirectionWords:
    """Decode the top left singular vectors of every block's Jacobian at one token.

    Costs the Jacobians and spectra of a measurement, and a pass of ``2 · rank`` vectors through the head for every block.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids of the prompt.
        position: token that is measured; negative counts from the end.
        rank: number K of singular vectors.
        words: nearest words of each sign.

    Returns:
        Token ids of the words, the shares of them that later blocks keep, and the singular values.

    Raises:
        CouplingError: if the model has fewer dimensions than ``rank``, or the prompt no such token.
    """
    if not 1 <= rank <= model.d_model or words < 1:
        raise CouplingError(
            f"got rank {rank} and {words} words for a model with d_model = {model.d_model}; "
            "choose 1 or more of each, and a rank of at most d_model"
        )
    found = block_jacobians(model, torch.tensor([list(tokens)]), output_token=position)
    triplets = top_singular(found.jacobians, rank)
    ids = torch.stack(
        [nearest_words(model, U.mT, words) for U in triplets.U.to(model.device)]
    ).cpu()
    return DirectionWords(ids.numpy(), kept_words(ids).numpy(), triplets.S.cpu().numpy())


def nearest_words(
    model: Any, directions: Float[Tensor, "direction d_model"], words: int
) -> Int[Tensor, "direction 2 word"]:
    """Token ids nearest to each direction and to its opposite.

    Args:
        model: whose ``logits`` is asked, final norm included.
        directions: unit vectors; scaled by √d_model, to the size that a norm's epsilon was made for.
        words: how many of each.

    Returns:
        Those of the direction, then those of its opposite, nearest first.
    """
    scaled = directions * math.sqrt(directions.shape[-1])
    odd = model.logits(scaled) - model.logits(-scaled)
    return torch.stack([odd.topk(words).indices, (-odd).topk(words).indices], dim=1)


def kept_words(ids: Int[Tensor, "layer rank 2 word"]) -> Float[Tensor, "layer layer rank 2"]:
    """[l, m, k, s]: of the words of direction (k, s) of layer l, the largest share that one direction of layer m has."""
    layers, rank, signs, words = ids.shape
    flat = ids.reshape(layers, rank * signs, words)
    kept = torch.empty(layers, layers, rank * signs, dtype=torch.float64)
    for one in range(layers):
        for other in range(layers):
            same = flat[one][:, None, :, None] == flat[other][None, :, None, :]
            kept[one, other] = same.any(dim=-1).double().mean(dim=-1).amax(dim=-1)
    return kept.reshape(layers, layers, rank, signs)


def chance_kept(model: Any, *, rank: int = 10, words: int = 10, seed: int = 0) -> float:
    """Mean share of words that a random direction has in common with the most similar of ``rank`` other random ones.

    Some words are near to many directions, so that it is not zero.

    Args:
        model: as for :func:`direction_words`.
        rank: directions of a set, orthonormal.
        words: nearest words of each sign.
        seed: of the directions.

    Returns:
        A share, from 0 to 1.
    """
    with seeded(seed):
        draws = torch.randn(RANDOM, model.d_model, rank)
    bases = torch.linalg.qr(draws).Q.to(model.device)
    kept = kept_words(torch.stack([nearest_words(model, basis.mT, words) for basis in bases]).cpu())
    return kept[~torch.eye(RANDOM, dtype=torch.bool)].mean().item()
