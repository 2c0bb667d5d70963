"""Size and symmetry of square matrices, for the cost of one product. NaN for a zero matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frobenius(J: Float[Tensor, "*batch d_model d_model"]) -> Float[Tensor, "*batch"]:
    """Return ‖J‖_F, summed in float64."""
    wide = J.dtype if J.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(J, dim=(-2, -1), dtype=wide)


def symmetric_share(
    J: Float[Tensor, "*batch d_model d_model"], size: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return ‖(J + Jᵀ)/2‖_F / ‖J‖_F: 1 for a symmetric matrix, 0 for an antisymmetric one.

    It is 1/√2 for a random matrix. ``size`` is `frobenius(J)` where that is known.
    """
    return frobenius((J + J.mT) / 2) / _nonzero(frobenius(J) if size is None else size)


def non_normality(
    J: Float[Tensor, "*batch d_model d_model"], size: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return ‖JJᵀ − JᵀJ‖_F / ‖J‖_F²: 0 for a normal matrix.

    With the symmetric part S and the antisymmetric part K it is 2‖KS + (KS)ᵀ‖_F: one product, and
    nothing cancels where J is nearly normal. ``size`` is `frobenius(J)` where that is known.
    """
    size = _nonzero(frobenius(J) if size is None else size)
    J = J / size.to(J.dtype)[..., None, None]  # The square of a small J may vanish in float32.
    product = ((J - J.mT) / 2) @ ((J + J.mT) / 2)
    return 2 * frobenius(product + product.mT)


def _nonzero(size: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return size.masked_fill(size == 0, torch.nan)
