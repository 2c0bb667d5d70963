"""Size and symmetry of one square matrix, at the price of one product. NaN for a zero matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frobenius(J: Float[Tensor, "d_model d_model"]) -> float:
    """Return ‖J‖_F, summed in float64."""
    return torch.linalg.vector_norm(J, dtype=_wide(J)).item()


def symmetric_share(J: Float[Tensor, "d_model d_model"]) -> float:
    """Return ‖(J + Jᵀ)/2‖_F / ‖J‖_F: 1 for a symmetric matrix, 0 for an antisymmetric one, 1/√2 for a random one."""
    size = frobenius(J)
    return frobenius((J + J.mT) / 2) / size if size else float("nan")


def non_normality(J: Float[Tensor, "d_model d_model"]) -> float:
    """Return ‖JJᵀ − JᵀJ‖_F / ‖J‖_F²: 0 for a normal matrix.

    With the symmetric part S and the antisymmetric part K it is 2‖KS + (KS)ᵀ‖_F: one product, and nothing cancels where J is
    nearly normal.
    """
    size = frobenius(J)
    if not size:
        return float("nan")
    J = J / size  # the square of a small Jacobian may vanish in float32
    product = ((J - J.mT) / 2) @ ((J + J.mT) / 2)
    return 2 * frobenius(product + product.mT)


def _wide(J: Tensor) -> torch.dtype:
    return J.dtype if J.device.type == "mps" else torch.float64
