"""Top singular triplets of square matrices, with a measured error bound.

A basis of the top right singular vectors comes from a symmetric eigendecomposition of the Gram matrix JᵀJ, on a GPU from
products alone where matrices are large (krylov.py); a Rayleigh-Ritz step on J itself then gives U, S and V. What comes out
is checked against J, and a matrix that fails is done again by a full SVD in float64.
"""

import math
from dataclasses import dataclass

import scipy.linalg
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.gram import leading_gram_eigenvectors
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.subspace import leading_right_vectors

# Largest accepted residual, and loss of orthogonality, of the Gram path; rounding costs it eps · σ_1/σ_k.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}

# From this width on a GPU would spend its time in full decompositions. A CPU's partial one stays faster than products alone:
# at d_model = 2048 it takes 0.5 s, they 0.6 to 1.6 s.
LARGE = 1024


@dataclass(frozen=True)
class SingularTriplets:
    """The k largest singular triplets of each matrix of a batch, largest first.

    Attributes:
        U: left singular vectors, orthonormal columns. Each (u, v) pair carries an arbitrary joint sign.
        S: singular values, descending.
        V: right singular vectors, orthonormal columns.
        residual: max over the k triplets of max(‖J v − σ u‖, ‖Jᵀ u − σ v‖) / σ_1; 0 for a zero matrix.
    """

    U: Float[Tensor, "*batch d_model rank"]
    S: Float[Tensor, "*batch rank"]
    V: Float[Tensor, "*batch d_model rank"]
    residual: Float[Tensor, "*batch"]


@exact_arithmetic()
@torch.no_grad()
def top_singular(J: Float[Tensor, "*batch d_model d_model"], k: int) -> SingularTriplets:
    """Return the k largest singular triplets of every matrix in J.

    Args:
        J: square matrices, float32 or float64.
        k: number of triplets, at most d_model. Ask for one more than needed where `relative_gap` is wanted.

    Raises:
        CouplingError: if J is not float32 or float64 or holds non-finite values, or k is outside 1 … d_model.
    """
    d_model = J.shape[-1]
    if not 1 <= k <= d_model:
        raise CouplingError(
            f"got k = {k} singular triplets of matrices with d_model = {d_model}, expected 1 to {d_model}, "
            "choose a smaller rank"
        )
    if J.dtype not in TOLERANCE:
        raise CouplingError(f"got matrices of {J.dtype}, expected float32 or float64, upcast them first")
    peak = torch.linalg.vector_norm(J.detach().flatten(-2), ord=math.inf, dim=-1)
    if not torch.isfinite(peak).all():
        raise CouplingError(
            "got non-finite values (NaN or infinity) in a matrix, expected finite ones, "
            "check the dtype the Jacobian was taken in"
        )
    batch = J.shape[:-2]
    J = J.detach().reshape(-1, d_model, d_model)
    exponent = _exponents(peak.reshape(-1))
    scaled = torch.ldexp(J, -exponent[:, None, None]) if exponent.any() else J
    U, S, V = _by_gram(scaled, k)
    residual = _residual(scaled, U, S, V)
    failed = ~(torch.maximum(residual, _orthogonality_loss(U, V)) <= TOLERANCE[J.dtype])
    for i in failed.nonzero().flatten().tolist():
        U[i], S[i], V[i] = _by_svd(scaled[i], k)
        residual[i] = _residual(scaled[i], U[i], S[i], V[i])
    S = torch.ldexp(S, exponent[:, None])
    return SingularTriplets(
        U.reshape(*batch, d_model, k), S.reshape(*batch, k), V.reshape(*batch, d_model, k), residual.reshape(batch)
    )


def relative_gap(S: Float[Tensor, "*batch values"], k: int) -> Float[Tensor, "*batch"]:
    """Return (σ_k − σ_{k+1}) / σ_k, NaN where σ_{k+1} is not among the given values or σ_k is 0.

    Raises:
        CouplingError: if k is outside 1 … number of values.
    """
    values = S.shape[-1]
    if not 1 <= k <= values:
        raise CouplingError(f"got k = {k} with {values} singular values, expected 1 to {values}, ask top_singular for more")
    if k == values:
        return torch.full_like(S[..., 0], torch.nan)
    return (S[..., k - 1] - S[..., k]) / S[..., k - 1]


def numerical_rank(S: Float[Tensor, "*batch values"], d_model: int) -> Int[Tensor, "*batch"]:
    """Return how many of the given singular values exceed rounding: d_model · eps · σ_1."""
    return (S > d_model * torch.finfo(S.dtype).eps * S[..., :1]).sum(dim=-1)


def _exponents(peak: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Powers of two by which to scale down matrices of these largest entries, 0 where their Gram matrix is safe as it is.

    A power of two scales exactly and keeps the Gram matrix from overflow and underflow.
    """
    exponent = torch.frexp(peak).exponent
    # The power itself must not overflow either: hence the limit.
    limit = -math.frexp(torch.finfo(peak.dtype).tiny)[1] - 5
    return torch.where(exponent.abs() <= limit // 6, 0, exponent.clamp(-limit, limit))


def _by_gram(J: Float[Tensor, "batch d_model d_model"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        basis = _leading_right_vectors(J, k)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError):
        # eigh gives up on the whole batch at once; NaN sends every matrix to the SVD.
        nan = J.new_full((J.shape[0], J.shape[-1], k), torch.nan)
        return nan, nan[:, 0].clone(), nan.clone()
    # Rayleigh-Ritz: J V = Q R with R = P S Wᵀ makes U = Q P orthonormal even where singular values vanish.
    Q, R = torch.linalg.qr(J @ basis)
    P, S, Wt = torch.linalg.svd(R)
    return Q @ P, S, basis @ Wt.mT


def _leading_right_vectors(J: Float[Tensor, "batch d_model d_model"], k: int) -> Float[Tensor, "batch d_model rank"]:
    """A basis of the top k right singular vectors of each matrix, largest first."""
    if J.device.type == "cpu":
        return leading_gram_eigenvectors(J, k)
    if J.shape[-1] < LARGE:
        return torch.linalg.eigh(J.mT @ J).eigenvectors[..., -k:].flip(-1)
    return torch.stack([_without_decomposition(matrix, k) for matrix in J])


def _without_decomposition(J: Float[Tensor, "d_model d_model"], k: int) -> Float[Tensor, "d_model rank"]:
    settled = leading_right_vectors(J, k, TOLERANCE[J.dtype] / 2)
    return torch.linalg.eigh(J.mT @ J).eigenvectors[:, -k:].flip(-1) if settled is None else settled


def _by_svd(J: Float[Tensor, "d_model d_model"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(J.double())
    return U[:, :k].to(J.dtype), S[:k].to(J.dtype), Vt[:k].mT.to(J.dtype)


def _residual(J: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Float[Tensor, "*batch"]:
    right = torch.linalg.vector_norm(J @ V - U * S[..., None, :], dim=-2)
    left = torch.linalg.vector_norm(J.mT @ U - V * S[..., None, :], dim=-2)
    worst = torch.maximum(right, left).amax(dim=-1)
    return torch.where(S[..., 0] == 0, worst, worst / S[..., 0])


def _orthogonality_loss(U: Tensor, V: Tensor) -> Float[Tensor, " batch"]:
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    losses = [(einsum(X, X, "b d i, b d j -> b i j") - eye).abs().amax(dim=(-2, -1)) for X in (U, V)]
    return torch.maximum(*losses)
