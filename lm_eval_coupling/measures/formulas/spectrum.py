"""Shape of one Jacobian's spectrum, and change of singular values with depth."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(S: Float[Tensor, " values"]) -> float:
    """Return exp of the entropy of σ / Σσ (Roy and Vetterli, 2007): n for n equal values."""
    p = S / S.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def participation_ratio(S: Float[Tensor, " values"]) -> float:
    """Return (Σσ²)² / Σσ⁴: n for n equal values."""
    return (S.square().sum().square() / S.pow(4).sum()).item()


def inverse_against_depth(
    S: Float[np.ndarray, "layer values"],
) -> tuple[Float[np.ndarray, " values"], Float[np.ndarray, " values"]]:
    """Return slope and R² of the least-squares line of 1/σ_k over depth l = 1 … L.

    Both are NaN with fewer than 3 blocks, or where a value is zero.
    """
    layers = len(S)
    slope, r2 = np.full((2, S.shape[1]), np.nan)
    if layers < 3:
        return slope, r2
    depth = np.arange(1, layers + 1) - (layers + 1) / 2
    positive = (S > 0).all(axis=0)
    inverse = 1 / S[:, positive]
    centered = inverse - inverse.mean(axis=0)
    slope[positive] = depth @ centered / (depth @ depth)
    spread = (centered**2).sum(axis=0)
    r2[positive] = np.divide(
        (depth @ centered) ** 2 / (depth @ depth),
        spread,
        out=np.full(spread.shape, np.nan),
        where=spread > 0,
    )
    return slope, r2
