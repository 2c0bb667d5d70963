"""Ablations of coupling: what remains of it when one of its possible sources is removed.

Undefined values are NaN: a single pair (K = 1), zero matrices, and matrices of which no more than
rounding remains. Sums are taken in float64.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.measures.formulas.miscoupling import at_ranks, miscoupling, off_diagonal_norm
from lm_eval_coupling.measures.formulas.normality import frobenius
from lm_eval_coupling.numerics.precision import true_float32
from lm_eval_coupling.numerics.spectra import TOLERANCE, SingularTriplets, numerical_rank


def rotated_miscoupling(
    A: Float[Tensor, "*batch rank rank"], off: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the root mean square of m̃(QᵀAQ) over Haar-random rotations Q of O(K).

    With E(qᵀAq)² = (2‖sym A‖_F² + (tr A)²) / (K(K + 2)) it is
    √(1 − (2‖sym A‖_F² + (tr A)²) / ((K + 2)‖A‖_F²)). Here it is written as a sum of squares, so
    that nothing cancels where A is nearly a multiple of I. Costs one norm of A − Aᵀ. ``off`` is
    `off_diagonal_norm(A)` where that is known.
    """
    K = A.shape[-1]
    if K == 1:
        return torch.full_like(A[..., 0, 0], torch.nan)
    off = off_diagonal_norm(A) if off is None else off
    diagonal = A.diagonal(dim1=-2, dim2=-1).double()
    spread = _norm(diagonal - diagonal.mean(dim=-1, keepdim=True))
    antisymmetric = torch.linalg.vector_norm(A - A.mT, dim=(-2, -1), dtype=torch.float64)
    kept = math.sqrt(K / (K + 2)) * torch.hypot(off, spread)
    rotated = torch.hypot(antisymmetric / math.sqrt(2 * (K + 2)), kept)
    return (rotated / torch.hypot(off, _norm(diagonal))).to(A.dtype)


def one_pair(
    A: Float[Tensor, "*batch rank rank"], off: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return A₁₁² / ‖A‖_F², the share of the first pair of singular vectors.

    ``off`` is `off_diagonal_norm(A)` where that is known.
    """
    if A.shape[-1] == 1:
        return torch.full_like(A[..., 0, 0], torch.nan)
    return (A[..., 0, 0].double() / _size(A, off)).square().to(A.dtype)


def negative_share(A: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """Return the share of negative entries on the diagonal of A."""
    negative = (A.diagonal(dim1=-2, dim2=-1) < 0).to(A.dtype).mean(dim=-1)
    zero = _size(A) == 0
    return negative.masked_fill(zero | (A.shape[-1] == 1), torch.nan)


def signed_coupling(A: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """Return tr A / (√K ‖A‖_F): 1 for a positive multiple of I, −1 for a negative one."""
    K = A.shape[-1]
    if K == 1:
        return torch.full_like(A[..., 0, 0], torch.nan)
    trace = A.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    return (trace / math.sqrt(K) / _size(A)).to(A.dtype)


def paired_miscoupling(A: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """Return m̃ of A; NaN for a single pair, where it says nothing."""
    normalized = miscoupling(A, normalized=True)
    return torch.full_like(normalized, torch.nan) if A.shape[-1] == 1 else normalized


@true_float32()
def deflated_miscoupling(
    A: Float[Tensor, "layer basis columns columns"],
    triplets: SingularTriplets,
    ranks: Sequence[int],
) -> Float[Tensor, "ranks layer basis"]:
    """Return m̃ of every J^l − σ₁u₁v₁ᵀ in the singular vectors 2 … K + 1 of every block.

    Its coupling matrices are A[1:, 1:] − σ₁ (U_{l'}ᵀu₁)(v₁ᵀV_{l'}), from products of vectors
    alone. They are NaN where they hold no more than the error of the triplets.

    Args:
        A: coupling matrices of all pairs, with all columns of the triplets.
        triplets: triplets of each J^l, more than K of them or NaN.
        ranks: numbers K of singular vectors.
    """
    U, S, V = triplets.U, triplets.S, triplets.V
    left = torch.einsum("bdk,ld->lbk", U[..., 1:], U[..., 0])
    right = torch.einsum("bdk,ld->lbk", V[..., 1:], V[..., 0])
    first = S[:, 0, None, None, None] * left[..., :, None] * right[..., None, :]
    if A.shape[-1] == 1:
        return A.new_full((len(ranks), *A.shape[:2]), torch.nan)
    deflated = A[..., 1:, 1:] - first
    only_error = _size(deflated) <= TOLERANCE[A.dtype] * S[:, :1].double()
    deflated = deflated.masked_fill(only_error[..., None, None], torch.nan)
    # These bases need one singular value more than K.
    rank = numerical_rank(S) - 1
    return at_ranks(deflated, rank, ranks, lambda A: {"m": paired_miscoupling(A)})["m"]


def without_identity(
    J: Float[Tensor, "*batch d_model d_model"],
) -> Float[Tensor, "*batch d_model d_model"]:
    """Return J − (tr J / d_model) I; a zero matrix where no more than rounding would remain."""
    d_model = J.shape[-1]
    trace = J.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    remainder = J.clone()
    remainder.diagonal(dim1=-2, dim2=-1).sub_((trace / d_model)[..., None])
    norms = [torch.linalg.vector_norm(part, dim=(-2, -1)) for part in (remainder, J)]
    only_rounding = norms[0] <= TOLERANCE[J.dtype] * norms[1]
    return remainder.masked_fill_(only_rounding[..., None, None], 0)


def trace_share(J: Float[Tensor, "*batch d_model d_model"]) -> Float[Tensor, "*batch"]:
    """Return tr J / (√d_model ‖J‖_F): ±1 for a multiple of the identity, near 0 for a random J."""
    trace = J.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    return trace / math.sqrt(J.shape[-1]) / frobenius(J)


def singular_cosines(triplets: SingularTriplets) -> Float[Tensor, "*batch rank"]:
    """Return cos(u_k, v_k); NaN where σ_k is zero and its vectors are arbitrary."""
    cosines = (triplets.U * triplets.V).sum(dim=-2)
    zero = triplets.S <= TOLERANCE[triplets.S.dtype] * triplets.S[..., :1]
    return cosines.masked_fill(zero, torch.nan)


def _size(
    A: Float[Tensor, "*batch rank rank"], off: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return ‖A‖_F in float64."""
    off = off_diagonal_norm(A) if off is None else off
    return torch.hypot(off, _norm(A.diagonal(dim1=-2, dim2=-1).double()))


def _norm(x: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(x, dim=-1)
