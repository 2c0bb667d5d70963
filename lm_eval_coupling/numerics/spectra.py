"""Top singular triplets of square matrices, with a measured error bound.

A basis of the top right singular vectors comes from the Gram matrix JᵀJ: on a CPU by LAPACK, one
matrix per core (:mod:`.gram`), elsewhere by products alone, all matrices at once
(:mod:`.subspace`). U and S follow from J itself. The triplets are checked against J. A matrix that
fails the check is decomposed again in float64, and at last by a full SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, whole
from lm_eval_coupling.numerics.devices import as_tensor, known_device
from lm_eval_coupling.numerics.gram import leading_gram_eigenvectors
from lm_eval_coupling.numerics.memory import layers_at_once, spectra_workers
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.subspace import block_of, leading_right_vectors, orthonormal
from lm_eval_coupling.numerics.workers import run_each

# Largest accepted residual and loss of orthogonality. Rounding costs eps · σ_1/σ_k.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


@dataclass(frozen=True)
class SingularTriplets:
    """The k largest singular triplets of each matrix of a batch, largest first.

    Attributes:
        U: left singular vectors, orthonormal columns. Each (u, v) pair carries an arbitrary joint
        sign. S: singular values, descending. V: right singular vectors, orthonormal columns.
        residual: max over the k triplets of max(‖J v − σ u‖, ‖Jᵀ u − σ v‖) / σ_1; 0 for a zero
            matrix.
    """

    U: Float[Tensor, "*batch d_model rank"]
    S: Float[Tensor, "*batch rank"]
    V: Float[Tensor, "*batch d_model rank"]
    residual: Float[Tensor, "*batch"]


@exact_arithmetic()
@torch.no_grad()
def top_singular(
    J: Float[Tensor, "*batch d_model d_model"], k: int, *, device: torch.device | None = None
) -> SingularTriplets:
    """Return the k largest singular triplets of every matrix in J.

    As many matrices are decomposed together as fit the device. On a CPU, workers of one thread each
    decompose a few matrices at a time.

    Args:
        J: square matrices, float32 or float64.
        k: number of triplets, at most d_model. One more than needed allows `relative_gap`.
        device: where to decompose, and where the triplets stay; by default where J lies. The CPU
            stands in for MPS, which has no float64.

    Raises:
        CouplingError: if J is not float32 or float64 or holds non-finite values, or k is outside 1
        … d_model.
    """
    J = as_tensor("J", J)
    if J.ndim < 2 or J.shape[-1] != J.shape[-2] or not J.shape[-1]:
        raise CouplingError(
            f"got J of shape {[*J.shape]}, expected square matrices [*batch, d_model, d_model]"
        )
    d_model = J.shape[-1]
    k = whole("k", k)
    if not 1 <= k <= d_model:
        raise CouplingError(
            f"got k = {k} singular triplets of matrices with d_model = {d_model}, "
            f"expected 1 to {d_model}, choose a smaller rank"
        )
    if J.dtype not in TOLERANCE:
        raise CouplingError(
            f"got matrices of {J.dtype}, expected float32 or float64, upcast them first"
        )
    device = J.device if device is None else known_device(device)
    device = torch.device("cpu") if device.type == "mps" else device
    matrices = J.detach().reshape(-1, d_model, d_model)
    at_once = layers_at_once(d_model, J.element_size(), device, k)
    parts = matrices.split(at_once) if len(matrices) else [matrices]
    count = spectra_workers(d_model, J.element_size()) if device.type == "cpu" else 1
    triplets = run_each(lambda part: _decompose(part.to(device), k), parts, count)
    U, S, V, residual = (torch.cat(each) for each in zip(*triplets, strict=True))
    batch = J.shape[:-2]
    return SingularTriplets(
        U.reshape(*batch, d_model, k),
        S.reshape(*batch, k),
        V.reshape(*batch, d_model, k),
        residual.reshape(batch),
    )


def relative_gap(S: Float[Tensor, "*batch values"], k: int) -> Float[Tensor, "*batch"]:
    """Return (σ_k − σ_{k+1}) / σ_k, NaN where σ_{k+1} is not among the given values or σ_k is 0.

    Raises:
        CouplingError: if k is outside 1 … number of values.
    """
    if k == _number_of_values(S, k):
        return torch.full_like(S[..., 0], torch.nan)
    return (S[..., k - 1] - S[..., k]) / S[..., k - 1]


def _number_of_values(S: Float[Tensor, "*batch values"], k: int) -> int:
    """Return the number of singular values, of which the k-th must be one."""
    values = S.shape[-1]
    if not 1 <= k <= values:
        raise CouplingError(
            f"got k = {k} with {values} singular values, expected 1 to {values}, "
            "ask top_singular for more"
        )
    return values


def numerical_rank(S: Float[Tensor, "*batch values"]) -> Int[Tensor, "*batch"]:
    """Return how many of the singular values are above `TOLERANCE` · σ_1, their largest error.

    The bound does not depend on the width. Rounding in a product over d_model terms grows with
    √d_model, and stays below the bound up to tens of thousands. The usual d_model · eps · σ_1 would
    take half a thousandth of σ_1 for zero in a wide model.
    """
    return (S > TOLERANCE[S.dtype] * S[..., :1]).sum(dim=-1)


def angle_bound(
    S: Float[Tensor, "*batch values"], residual: Float[Tensor, "*batch"], k: int
) -> Float[Tensor, "*batch"]:
    """Return a bound on the sine of the angle between the computed and the exact v_k (and u_k).

    It is Davis and Kahan's for the matrix [[0, J], [Jᵀ, 0]], whose eigenvector is (u, v)/√2: √2 ·
    ‖residual‖ over the distance of σ_k to the other singular values, each of which may be off by
    the residual. It is 1 where the residual says nothing.

    Args:
        S: singular values, descending; σ_{k+1} must be among them unless there is none.
        residual: that of the triplets, relative to σ_1.
        k: number of the pair, from 1.

    Raises:
        CouplingError: if k is outside 1 … number of values.
    """
    values = _number_of_values(S, k)
    S, error = S.double(), residual.double() * S[..., 0].double()
    away = [S[..., k - 2] - S[..., k - 1]] if k > 1 else []
    away.append(S[..., k - 1] - S[..., k] if k < values else 2 * S[..., k - 1])
    distance = torch.stack(away).amin(dim=0) - 2 * error
    bound = torch.where(distance > 0, math.sqrt(2) * error / distance, 1.0).clamp(max=1)
    return bound.to(residual.dtype)


@exact_arithmetic()
@torch.no_grad()
def largest_singular_values(J: Float[Tensor, "*batch d_model d_model"]) -> Float[Tensor, "*batch"]:
    """Return σ_1 of every matrix, to 1e-6 relative, by products alone.

    The error of σ_1 is the square of the residual. Dtype and device are those of J.

    Raises:
        CouplingError: as `top_singular` does.
    """
    d_model = J.shape[-1]
    matrices = J.detach().reshape(-1, d_model, d_model)
    if J.device.type == "mps" or not len(matrices) or 2 * block_of(1, d_model) > d_model:
        return top_singular(J, 1).S[..., 0]
    sigmas = []
    for part in matrices.split(layers_at_once(d_model, J.element_size(), J.device, 1)):
        scale = torch.linalg.vector_norm(part.flatten(1), ord=math.inf, dim=-1)
        scaled = part / torch.where(scale == 0, 1, scale)[:, None, None]
        v, settled = leading_right_vectors(scaled, 1, 3e-4)
        sigma = scale * torch.linalg.vector_norm(scaled @ v, dim=(-2, -1))
        for i in (~settled | ~torch.isfinite(sigma)).nonzero().flatten().tolist():
            sigma[i] = top_singular(part[i], 1).S[0]
        sigmas.append(sigma)
    return torch.cat(sigmas).reshape(J.shape[:-2])


def _decompose(
    J: Float[Tensor, "batch d_model d_model"], k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return U, S, V and residual of each matrix, by the first method that passes the check."""
    peak = torch.linalg.vector_norm(J.flatten(-2), ord=math.inf, dim=-1)
    exponent = _exponents(peak)
    finite, scaled = torch.stack([torch.isfinite(peak).all(), (exponent != 0).any()]).tolist()
    if not finite:
        raise CouplingError(
            "got non-finite values (NaN or infinity) in a matrix, expected finite ones, "
            "check the dtype the Jacobian was taken in"
        )
    if scaled:
        J = torch.ldexp(J, -exponent[:, None, None])
    # Of a zero matrix any vectors are right.
    U = torch.eye(J.shape[-1], k, dtype=J.dtype, device=J.device).repeat(len(J), 1, 1)
    S, V, residual = J.new_zeros(len(J), k), U.clone(), J.new_zeros(len(J))
    left, at_once = peak.nonzero().flatten(), len(J)
    for method in _methods(J, k):
        failed = []
        for part in left.split(at_once) if len(left) else ():
            matrices = J if len(part) == len(J) else J[part]
            triplets = method(matrices)
            errors = _residual(matrices, *triplets)
            for stored, new in zip((U, S, V, residual), (*triplets, errors), strict=True):
                stored[part] = new
            worst = torch.maximum(errors, _orthogonality_loss(triplets[0], triplets[2]))
            # Not `>`: a result that is no number has failed.
            failed.append(part[~(worst <= TOLERANCE[J.dtype])])
        left = torch.cat(failed) if failed else left
        at_once = max(1, len(J) // 4)  # the other methods take copies of twice the size
    return U, torch.ldexp(S, exponent[:, None]), V, residual


def _methods(J: Tensor, k: int) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Yield functions that compute the triplets, the fastest first, the most reliable last."""
    basis = _right_vectors_on_cpu if J.device.type == "cpu" else _right_vectors_on_device
    yield lambda matrices: _triplets(matrices, basis(matrices, k, TOLERANCE[J.dtype] / 2))
    if J.dtype == torch.float32:  # its Gram matrix holds a σ_k down to σ_1/1000 at best

        def in_float64(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wide = matrices.double()
            U, S, V = _triplets(wide, basis(wide, k, TOLERANCE[J.dtype] / 20))
            return U.to(J.dtype), S.to(J.dtype), V.to(J.dtype)

        yield in_float64
    yield lambda matrices: _by_svd(matrices, k)


def _right_vectors_on_cpu(
    J: Tensor, k: int, tolerance: float
) -> Float[Tensor, "batch d_model rank"]:
    del tolerance
    return leading_gram_eigenvectors(J, k)


def _right_vectors_on_device(
    J: Tensor, k: int, tolerance: float
) -> Float[Tensor, "batch d_model rank"]:
    # A narrow matrix is decomposed whole: a block of columns would save nothing.
    if 2 * block_of(k, J.shape[-1]) > J.shape[-1]:
        return leading_gram_eigenvectors(J.cpu(), k).to(J.device)
    return leading_right_vectors(J, k, tolerance)[0]


def _triplets(J: Tensor, V: Float[Tensor, "batch d_model rank"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V, in the order of S, for right singular vectors V.

    The Cholesky factor R of JV = U R has the singular values on its diagonal, and the error of V
    beside it. Where σ is rounding, u completes the basis.
    """
    JV = J @ V
    S = torch.linalg.vector_norm(JV, dim=-2)
    S, order = S.sort(dim=-1, descending=True)
    order = order[:, None].expand_as(V)
    JV, V = JV.gather(-1, order), V.gather(-1, order)
    zero = S <= 4 * torch.finfo(S.dtype).eps * S[:, :1]
    noise = torch.randn(
        V.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(V)
    return orthonormal(torch.where(zero[:, None], noise, JV)), S, V


def _by_svd(J: Float[Tensor, "batch d_model d_model"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = [torch.linalg.svd(matrix.double()) for matrix in J]
    U, S, Vt = (torch.stack(each) for each in zip(*parts, strict=True))
    return U[..., :k].to(J.dtype), S[..., :k].to(J.dtype), Vt[..., :k, :].mT.to(J.dtype)


def _exponents(peak: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Return exponents e of factors 2⁻ᵉ that keep the Gram matrix from overflow and underflow.

    A power of two scales exactly; e is 0 where no scaling is needed. ``peak`` is the largest entry
    of each matrix.
    """
    exponent = torch.frexp(peak).exponent
    # The limit keeps the power itself from overflow.
    limit = -math.frexp(torch.finfo(peak.dtype).tiny)[1] - 5
    return torch.where(exponent.abs() <= limit // 6, 0, exponent.clamp(-limit, limit))


def _residual(J: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Float[Tensor, "*batch"]:
    right = torch.linalg.vector_norm(J @ V - U * S[..., None, :], dim=-2)
    left = torch.linalg.vector_norm(J.mT @ U - V * S[..., None, :], dim=-2)
    worst = torch.maximum(right, left).amax(dim=-1)
    return torch.where(S[..., 0] == 0, worst, worst / S[..., 0])


def _orthogonality_loss(U: Tensor, V: Tensor) -> Float[Tensor, " batch"]:
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    losses = [(X.mT @ X - eye).abs().amax(dim=(-2, -1)) for X in (U, V)]
    return torch.maximum(*losses)
