"""Vocabulary nearest to the top left singular vectors of every block, for one prompt.

A direction u is decoded by the model's own final norm and head. Singular vectors have no sign, so
both u and −u are decoded, by the odd part of the logits, (logits(u) − logits(−u)) / 2: a bias of
the norm or the head says the same of every direction and drops out. The tokens of the largest
entries are the words of u, those of the smallest the words of −u.
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

STAYS = 0.5  # a direction counts as the same while it keeps this share of its words
RANDOM = 4  # sets of random directions that estimate chance


@dataclasses.dataclass(frozen=True)
class DirectionWords:
    """Words of one prompt's directions.

    ``ids`` are token ids, nearest first, of u and of −u: Int[layer rank 2 word].
    ``kept`` is the largest share of a direction's words that one direction of another layer has,
    of either sign: Float[layer other_layer rank 2].
    ``singular_values``: Float[layer rank].
    """

    ids: np.ndarray
    kept: np.ndarray
    singular_values: np.ndarray

    @property
    def life(self) -> np.ndarray:
        """Count the layers in a row that keep at least STAYS of the words, Int[layer rank 2]."""
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

    Costs the Jacobians and spectra of a measurement, and ``2 · rank`` vectors through the head for
    each block.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids of the prompt.
        position: measured token; negative counts from the end.
        rank: number K of singular vectors.
        words: nearest words of each sign.

    Returns:
        Token ids of the words, the shares that other layers keep, and the singular values.

    Raises:
        CouplingError: if ``rank`` exceeds ``d_model``, or the prompt has no such token.
    """
    if not 1 <= rank <= model.d_model or words < 1:
        raise CouplingError(
            f"got rank {rank} and {words} words for a model with d_model = {model.d_model}; "
            "choose 1 or more of each, and a rank of at most d_model"
        )
    blocks = block_jacobians(model, torch.tensor([list(tokens)]), output_token=position)
    triplets = top_singular(blocks.jacobians, rank)
    U = triplets.U.to(model.device)
    ids = torch.stack([nearest_words(model, directions.mT, words) for directions in U]).cpu()
    return DirectionWords(ids.numpy(), kept_words(ids).numpy(), triplets.S.cpu().numpy())


def nearest_words(
    model: Any, directions: Float[Tensor, "direction d_model"], words: int
) -> Int[Tensor, "direction 2 word"]:
    """Return the tokens whose logits a direction u raises most, and those of −u.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        directions: unit vectors of the stream.
        words: number of tokens of each sign.

    Returns:
        Token ids by falling logits(u) − logits(−u), then those by falling logits(−u) − logits(u).
    """
    # A norm's epsilon is chosen for vectors of length √d_model, not 1.
    scaled = directions * math.sqrt(directions.shape[-1])
    odd = model.logits(scaled) - model.logits(-scaled)
    return torch.stack([odd.topk(words).indices, (-odd).topk(words).indices], dim=1)


def kept_words(ids: Int[Tensor, "layer rank 2 word"]) -> Float[Tensor, "layer layer rank 2"]:
    """Return [l, m, k, s]: the share of direction (k, s) of layer l that layer m keeps.

    It is the largest share of the direction's words that any one direction of layer m has.
    """
    layers, rank, signs, words = ids.shape
    flat = ids.reshape(layers, rank * signs, words)
    kept = torch.empty(layers, layers, rank * signs, dtype=torch.float64)
    for layer in range(layers):
        for other in range(layers):
            same = flat[layer][:, None, :, None] == flat[other][None, :, None, :]
            kept[layer, other] = same.any(dim=-1).double().mean(dim=-1).amax(dim=-1)
    return kept.reshape(layers, layers, rank, signs)


def chance_kept(model: Any, *, rank: int = 10, words: int = 10, seed: int = 0) -> float:
    """Estimate the share of words that another set of random directions keeps.

    It is above zero: some words are near to many directions.

    Args:
        model: as for :func:`direction_words`.
        rank: number of orthonormal directions in a set.
        words: nearest words of each sign.
        seed: seed of the directions.

    Returns:
        A share, from 0 to 1.
    """
    with seeded(seed):
        draws = torch.randn(RANDOM, model.d_model, rank)
    bases = torch.linalg.qr(draws).Q.to(model.device)
    kept = kept_words(torch.stack([nearest_words(model, basis.mT, words) for basis in bases]).cpu())
    return kept[~torch.eye(RANDOM, dtype=torch.bool)].mean().item()
