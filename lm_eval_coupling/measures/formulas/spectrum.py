"""The shape of one Jacobian's spectrum, and how singular values change with depth."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
        (depth @ centred) ** 2 / (depth @ depth),
        spread,
        out=np.full(spread.shape, np.nan),
        where=spread > 0,
    )
    return slope, r2
