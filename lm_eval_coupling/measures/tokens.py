"""Coupling between tokens, and how strongly each token moves a later one: what a prompt's other Jacobians say.

*Self-coupling* compares the Jacobians J_tt of different tokens, *context coupling* those that share their input token
(J_{s t} for t after s) or their output token (J_{t T} for t before T). All of it is exact; what is zero because a later
token cannot move an earlier one has no coupling and is NaN.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import TOLERANCE
from lm_eval_coupling.jacobians.pairs import jacobians_of_pairs
from lm_eval_coupling.measures import coupling as coupling_maths
from lm_eval_coupling.numerics.spectra import numerical_rank, top_singular
from lm_eval_coupling.numerics.subspace import leading_right_vectors

TOKENS = "all, lastN, firstN, randomN such as last8, or positions such as 0+3+-1"
LAYERS = "all, spacedN such as spaced4, or blocks such as 0+10+29"


def chosen_tokens(choice: str, position: int) -> list[int]:
    """The tokens up to ``position`` that ``choice`` names, in order.

    Raises:
        CouplingError: if it cannot be read, or names a token that is not there.
    """
    seq = position + 1
    if choice == "all":
        return list(range(seq))
    if named := re.fullmatch(r"(last|first|random)([1-9]\d*)", choice):
        count = min(int(named[2]), seq)
        everything = range(seq)
        if named[1] == "random":
            return sorted(random.Random(seq).sample(everything, count))
        return list(everything[-count:] if named[1] == "last" else everything[:count])
    found = _numbers(choice, "coupling_tokens", TOKENS)
    if bad := [t for t in found if not -seq <= t < seq]:
        raise CouplingError(
            f"got token {bad[0]} of a prompt whose measured token is number {position}, expected {-seq} to {position}"
        )
    return sorted({t % seq for t in found})


def chosen_layers(choice: str, n_layers: int) -> list[int]:
    """The blocks, counted from 0, that ``choice`` names.

    Raises:
        CouplingError: if it cannot be read, or names a block that is not there.
    """
    if choice == "all":
        return list(range(n_layers))
    if named := re.fullmatch(r"spaced([1-9]\d*)", choice):
        count = min(int(named[1]), n_layers)
        return sorted({round(i * (n_layers - 1) / max(1, count - 1)) for i in range(count)})
    found = _numbers(choice, "coupling_layers", LAYERS)
    if bad := [layer for layer in found if not -n_layers <= layer < n_layers]:
        raise CouplingError(f"got layer {bad[0]} of a model of {n_layers} blocks, expected {-n_layers} to {n_layers - 1}")
    return sorted({layer % n_layers for layer in found})


def _numbers(choice: str, name: str, expected: str) -> list[int]:
    try:
        return [int(part) for part in choice.strip("[] ").replace(",", "+").split("+")]
    except ValueError:
        raise CouplingError(f"got {name}={choice}, expected {expected}") from None


@dataclass(frozen=True)
class Blocks:
    """Jacobians of one prompt over chosen layers and pairs of tokens, [layer, pair, d_model, d_model], on the host."""

    jacobians: Float[Tensor, "layer pair d_model d_model"]
    device: torch.device


def jacobians_over(trace, layers: Sequence[int], pairs: Sequence[tuple[int, int]], method: str) -> Blocks:
    """As :func:`~lm_eval_coupling.jacobians.pairs.jacobians_of_pairs` for several layers.

    Raises:
        CouplingError: if one of them fails its certificate at every level.
    """
    found = []
    for layer in layers:
        J, errors = jacobians_of_pairs(trace.calls[layer], pairs, method)
        worst = int(errors.nan_to_num(math.inf).argmax())
        if not errors[worst] <= TOLERANCE[J.dtype]:
            output, given = pairs[worst]
            raise CouplingError(
                f"the Jacobian of block {layer} for tokens {given} and {output} is off by {errors[worst]:.1e} against the "
                f"model's own derivative, expected at most {TOLERANCE[J.dtype]:.0e}"
            )
        found.append(J.cpu())
    return Blocks(torch.stack(found), trace.resid_final.device)


def miscoupling_of_all(blocks: Blocks, ranks: Sequence[int]) -> Float[np.ndarray, "rank layer layer pair pair"]:
    """m̃ of every Jacobian in the basis of every other: first index of each kind the Jacobian's, second the basis's."""
    layers, pairs, d_model, _ = blocks.jacobians.shape
    J = blocks.jacobians.reshape(-1, d_model, d_model)
    device = torch.device("cpu") if blocks.device.type == "mps" else blocks.device
    triplets = [top_singular(matrix.to(device), ranks[-1]) for matrix in J]
    U, S, V = (torch.stack([getattr(one, name) for one in triplets]) for name in ("U", "S", "V"))
    rank = numerical_rank(S, d_model)
    found = torch.empty(len(ranks), len(J), len(J), dtype=torch.float64)
    for i in range(len(J)):  # one Jacobian's products at a time: all of them would be large
        A = coupling_maths.coupling_matrices(J[i : i + 1], U, V)[0]
        for r, k in enumerate(ranks):
            found[r, i] = coupling_maths.miscoupling(A[..., :k, :k], normalized=True).masked_fill(rank < k, torch.nan).cpu()
    split = found.reshape(len(ranks), layers, pairs, layers, pairs)
    return split.permute(0, 1, 3, 2, 4).numpy().astype(np.float32)


def self_coupling(trace, position: int, settings) -> dict[str, Any]:
    """m̃ between the J_tt of the chosen tokens, for all pairs of the chosen layers."""
    layers, tokens = chosen_layers(settings.layers, len(trace.calls)), chosen_tokens(settings.tokens, position)
    blocks = jacobians_over(trace, layers, [(t, t) for t in tokens], settings.method)
    found = miscoupling_of_all(blocks, settings.ranks)
    return {"self_tokens": tuple(tokens), "self_layers": tuple(layers), "self_miscoupling": found, "reason": None}


def context_coupling(trace, position: int, settings) -> dict[str, Any]:
    """m̃ between Jacobians with the input token fixed (the first chosen) and with the output token fixed (the measured)."""
    layers, tokens = chosen_layers(settings.layers, len(trace.calls)), chosen_tokens(settings.tokens, position)
    from_first = jacobians_over(trace, layers, [(t, tokens[0]) for t in tokens], settings.method)
    to_last = jacobians_over(trace, layers, [(position, t) for t in tokens], settings.method)
    found = {
        "context_tokens": tuple(tokens),
        "context_layers": tuple(layers),
        "context_input_miscoupling": miscoupling_of_all(from_first, settings.ranks),
        "context_output_miscoupling": miscoupling_of_all(to_last, settings.ranks),
    }
    undefined = sum(int(np.isnan(found[name][-1]).sum()) for name in found if name.endswith("miscoupling"))
    size = 2 * (len(layers) * len(tokens)) ** 2
    why = f"{undefined} of {size} context couplings are undefined: a Jacobian is zero or of rank below K"
    return found | {"reason": why if undefined else None}


def influence(trace, position: int, settings) -> dict[str, Any]:
    """How strongly each token moves the measured one, block by block, and the shape of the spectrum of its own Jacobian."""
    pairs = [(position, t) for t in range(position + 1)]
    columns: dict[str, list[Any]] = {name: [] for name in ("frobenius", "spectral", "effective_rank", "participation", "S")}
    for layer in range(len(trace.calls)):
        J = jacobians_over(trace, [layer], pairs, settings.method).jacobians[0]
        S = torch.linalg.svdvals(J[-1]).double()
        columns["frobenius"].append(J.double().norm(dim=(1, 2)).numpy())
        columns["spectral"].append([largest_singular_value(one) for one in J])
        columns["effective_rank"].append(effective_rank(S))
        columns["participation"].append(participation_ratio(S))
        columns["S"].append(S[: settings.ranks[-1]].numpy())
    slope, r2 = inverse_against_depth(np.stack(columns["S"]))
    return {
        "effective_rank": np.array(columns["effective_rank"], np.float32),
        "participation_ratio": np.array(columns["participation"], np.float32),
        "frobenius_norms": np.stack(columns["frobenius"]).astype(np.float32),
        "spectral_norms": np.array(columns["spectral"], np.float32),
        "depth_slope": slope.astype(np.float32),
        "depth_r2": r2.astype(np.float32),
        "reason": None,
    }


def largest_singular_value(J: Float[Tensor, "d_model d_model"]) -> float:
    """σ_1 to 1e-6 relative: its error is that of the residual squared."""
    scale = J.abs().max()
    if scale == 0:
        return 0.0
    v = leading_right_vectors(J / scale, 1, 1e-3)
    return (top_singular(J, 1).S[0] if v is None else scale * torch.linalg.vector_norm(J / scale @ v)).item()


def effective_rank(S: Float[Tensor, " values"]) -> float:
    """Number of equal singular values that would be spread alike: exp of the entropy of σ / Σσ (Roy and Vetterli, 2007)."""
    p = S / S.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def participation_ratio(S: Float[Tensor, " values"]) -> float:
    """(Σσ²)² / Σσ⁴."""
    return (S.square().sum().square() / S.pow(4).sum()).item()


def inverse_against_depth(
    S: Float[np.ndarray, "layer values"],
) -> tuple[Float[np.ndarray, " values"], Float[np.ndarray, " values"]]:
    """Slope and R² of the least-squares line of 1/σ_k over depth l = 1 … L; NaN with fewer than 3 blocks or a zero value."""
    layers = len(S)
    slope, r2 = np.full((2, S.shape[1]), np.nan)
    if layers < 3:
        return slope, r2
    depth = np.arange(1, layers + 1) - (layers + 1) / 2
    good = (S > 0).all(axis=0)
    inverse = 1 / S[:, good]
    centred = inverse - inverse.mean(axis=0)
    slope[good] = depth @ centred / (depth @ depth)
    spread = (centred**2).sum(axis=0)
    r2[good] = np.divide(
        (depth @ centred) ** 2 / (depth @ depth), spread, out=np.full(spread.shape, np.nan), where=spread > 0
    )
    return slope, r2


def cost(n_layers: int, d_model: int, position: int, settings) -> tuple[int, float]:
    """Jacobians that a prompt takes beside those of the depth, and MB of them held at a time."""
    counts = []
    tokens = len(chosen_tokens(settings.tokens, position))
    layers = len(chosen_layers(settings.layers, n_layers))
    if "self" in settings.measures:
        counts.append((layers * tokens, layers * tokens))
    if "context" in settings.measures:
        counts.append((2 * layers * tokens, layers * tokens))
    if "spectra" in settings.measures:
        counts.append((n_layers * (position + 1), position + 1))
    size = d_model**2 * (8 if settings.dtype == "float64" else 4) / 1e6
    return sum(n for n, _ in counts), max((held for _, held in counts), default=0) * size
