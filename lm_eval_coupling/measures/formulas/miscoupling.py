"""Coupling matrices and miscoupling: pure functions of Jacobians and their singular triplets.

A = U_{l'}ᵀ J^l V_{l'} is the Jacobian of layer l in the singular basis of layer l'. In tensors of
all pairs, the first layer index is the Jacobian's and the second the basis's. Matrices of a smaller
rank are cut from the largest: A[..., :K, :K]. The swapped variant ("vju") takes the same functions
with U and V exchanged. Undefined values are NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, flag, one_of, shown
from lm_eval_coupling.numerics.devices import as_tensor
from lm_eval_coupling.numerics.memory import PAIRS_AT_ONCE
from lm_eval_coupling.numerics.precision import true_float32
from lm_eval_coupling.numerics.spectra import SingularTriplets, numerical_rank
from lm_eval_coupling.numerics.workers import run_each, workers


@true_float32()
def coupling_matrix(
    J1: Float[Tensor, "*#batch d_model d_model"],
    U2: Float[Tensor, "*#batch d_model rank"],
    V2: Float[Tensor, "*#batch d_model rank"],
) -> Float[Tensor, "*out rank rank"]:
    """Return A = U2ᵀ J1 V2, broadcast over leading dimensions.

    Raises:
        CouplingError: if an argument is not a tensor, or shapes, dtypes or devices do not match.
    """
    J1, U2, V2 = as_tensor("J1", J1), as_tensor("U2", U2), as_tensor("V2", V2)
    parts = {"J1": J1, "U2": U2, "V2": V2}
    shapes = ", ".join(
        f"{name} {[*part.shape]} {part.dtype} on {part.device}" for name, part in parts.items()
    )
    wide = (
        min(J1.ndim, U2.ndim, V2.ndim) > 1
        and {*J1.shape[-2:], U2.shape[-2]} == {V2.shape[-2]}
        and U2.shape == V2.shape
    )
    kinds = {(part.dtype, part.device) for part in parts.values()}
    alike = len(kinds) == 1 and J1.is_floating_point()
    if not wide or not alike or not _broadcast(J1.shape[:-2], U2.shape[:-2]):
        raise CouplingError(
            f"got {shapes}, expected J1 [*batch, d_model, d_model] and U2, V2 "
            "[*batch, d_model, rank] of one dtype and device"
        )
    return U2.mT @ (J1 @ V2)


@true_float32()
def coupling_matrices(
    J: Float[Tensor, "layer d_model d_model"],
    U: Float[Tensor, "basis d_model rank"],
    V: Float[Tensor, "basis d_model rank"],
) -> Float[Tensor, "layer basis rank rank"]:
    """Return A[l, l'] = U_{l'}ᵀ J^l V_{l'} for all pairs at once, on the device of V.

    J may lie on another device; a few layers are moved at a time. Working memory besides the result
    is basis · d_model · rank numbers on a CPU, and up to `PAIRS_AT_ONCE` bytes on a GPU, where
    kernel launches count.
    """
    layers, (bases, d_model, rank) = J.shape[0], V.shape
    all_V = rearrange(V, "basis d k -> (basis k) d")
    at_once, side_by_side = 1, workers(2 * all_V.numel() * V.element_size())
    if V.device.type != "cpu":
        at_once = max(1, min(layers, PAIRS_AT_ONCE // (all_V.numel() * V.element_size())))
        side_by_side = 1
    A = V.new_empty(layers, bases, rank, rank)

    def multiply(firsts: range) -> None:
        # One buffer, transposed and reused: fresh pages cost half as much as the product.
        JV = V.new_empty(at_once, bases, rank, d_model)
        for first in firsts:
            some = J[first : first + at_once].to(V.device)
            part = JV[: len(some)]
            torch.matmul(all_V, some.mT, out=part.flatten(1, 2))
            torch.matmul(U.mT, part.mT, out=A[first : first + at_once])

    firsts = range(0, layers, at_once)
    run_each(multiply, [firsts[i::side_by_side] for i in range(side_by_side)], side_by_side)
    return A


def off_diagonal_norm(A: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """Return ‖A − Diag A‖_F in float64, so that squares of small float32 entries do not vanish.

    It is most of the cost of a miscoupling: pass it on where several of the same A are needed.
    """
    eye = torch.eye(A.shape[-1], dtype=torch.bool, device=A.device)
    # Zeroed, not ‖A‖² − ‖Diag A‖², which cancels for nearly diagonal A.
    return torch.linalg.vector_norm(A.masked_fill(eye, 0), dim=(-2, -1), dtype=torch.float64)


def miscoupling(
    A: Float[Tensor, "*batch rank rank"],
    normalized: bool = False,
    off: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return m(A) = ‖A − Diag A‖_F, divided by ‖A‖_F where normalized (NaN where that is 0).

    ``off`` is `off_diagonal_norm(A)` where that is known.

    Raises:
        CouplingError: if A is no tensor of square matrices.
    """
    A, normalized = _matrices(A), flag("normalized", normalized)
    off = off_diagonal_norm(A) if off is None else off
    return (off / torch.hypot(off, _norm(_diagonal(A))) if normalized else off).to(A.dtype)


def miscoupling_to(
    A: Float[Tensor, "*#batch rank rank"],
    S1: Float[Tensor, "*#batch rank"],
    *,
    p: float | int = 2,
    absolute: bool = False,
    norm: Literal["p", "trace"] = "p",
    off: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*out"]:
    """Return m_K = ‖A − diag(S1)‖_F / ‖S1‖_p, NaN where the divisor is 0.

    Args:
        A: coupling matrices U2ᵀ J1 V2.
        S1: top singular values of J1; for A[layer, basis] of `coupling_matrices` pass S[:, None].
        p: order of the vector norm of S1, which is the Schatten norm of diag(S1).
        absolute: compare |A| entrywise, as the authors' released code does.
        norm: "trace" divides by the sum of S1 instead, whatever p.
        off: `off_diagonal_norm(A)` where that is known.

    Raises:
        CouplingError: if norm is neither "p" nor "trace", p is not positive, or shapes differ.
    """
    A, S1, absolute = _matrices(A), as_tensor("S1", S1), flag("absolute", absolute)
    one_of("norm", norm, ("p", "trace"))
    if isinstance(p, bool) or not isinstance(p, int | float) or not p > 0:
        raise CouplingError(f"got p={shown(p)}, expected a positive number such as 2, or math.inf")
    if not S1.ndim or S1.shape[-1] != A.shape[-1] or not _broadcast(A.shape[:-2], S1.shape[:-1]):
        raise CouplingError(
            f"got A {[*A.shape]} and S1 {[*S1.shape]}, expected A [*batch, rank, rank] and "
            "S1 [*batch, rank]; for A[layer, basis] of all pairs pass S[:, None]"
        )
    off = off_diagonal_norm(A) if off is None else off
    diagonal = _diagonal(A).abs() if absolute else _diagonal(A)
    distance = torch.hypot(off, _norm(diagonal - S1.double()))
    size = (
        S1.double().sum(dim=-1)
        if norm == "trace"
        else torch.linalg.vector_norm(S1.double(), ord=p, dim=-1)
    )
    return torch.where(size == 0, torch.nan, distance / size).to(A.dtype)


def normalized_by_rank(
    J: Float[Tensor, "layer d_model d_model"], triplets: SingularTriplets, ranks: Sequence[int]
) -> Float[Tensor, "ranks layer layer"]:
    """Return m̃ of all pairs for every rank, NaN in the bases of Jacobians of lower rank.

    Args:
        J: one Jacobian for each layer.
        triplets: their triplets, at least as many as the largest rank.
        ranks: ascending.
    """
    largest = ranks[-1]
    U, S, V = (part[..., :largest] for part in (triplets.U, triplets.S, triplets.V))
    A = coupling_matrices(J, U, V)
    return at_ranks(A, numerical_rank(S), ranks, lambda A: {"m": miscoupling(A, normalized=True)})[
        "m"
    ]


def at_ranks(
    A: Float[Tensor, "*batch basis max_rank max_rank"],
    rank: Int[Tensor, "*#batch basis"],
    ranks: Sequence[int],
    compute: Callable[[Tensor], Mapping[str, Tensor]],
) -> dict[str, Float[Tensor, "ranks *batch basis"]]:
    """Return numbers of A cut to every rank, stacked, by name; NaN in bases of lower rank.

    The singular vectors of a zero σ are arbitrary, and so would be the numbers.

    Args:
        A: coupling matrices at the largest rank.
        rank: `numerical_rank` of the Jacobian of each basis.
        ranks: numbers K of singular vectors.
        compute: function of A[..., :K, :K] that returns numbers of its matrices by name.
    """
    by_rank = [
        {
            name: values.masked_fill(rank < k, torch.nan)
            for name, values in compute(A[..., :k, :k]).items()
        }
        for k in ranks
    ]
    return {name: torch.stack([values[name] for values in by_rank]) for name in by_rank[0]}


@true_float32()
def subspace_overlaps(
    U: Float[Tensor, "*batch layer d_model max_rank"], ranks: Sequence[int]
) -> Float[Tensor, "ranks *batch layer layer"]:
    """Return ‖U_{l'}ᵀ U_l‖_F² / K of the leading K columns, for every rank and pair of layers.

    It is 1 for equal subspaces and 0 for orthogonal ones, whichever basis spans them.

    Raises:
        CouplingError: if a rank is outside 1 … number of columns.
    """
    layers, _, columns = U.shape[-3:]
    if bad := [k for k in ranks if not 1 <= k <= columns]:
        raise CouplingError(
            f"got ranks {bad} with {columns} singular vectors, expected 1 to {columns}; "
            "ask top_singular for more"
        )
    all_U = rearrange(U, "... layer d k -> ... d (layer k)")
    squares = rearrange(
        (all_U.mT @ all_U).square(), "... (l1 i) (l2 j) -> ... l1 l2 i j", l1=layers, l2=layers
    )
    return torch.stack(
        [reduce(squares[..., :k, :k], "... l1 l2 i j -> ... l1 l2", "sum") / k for k in ranks]
    )


def _diagonal(A: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank"]:
    return A.diagonal(dim1=-2, dim2=-1).double()


def _norm(x: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(x, dim=-1)


def _matrices(A: Any) -> Tensor:
    A = as_tensor("A", A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or not A.shape[-1] or not A.is_floating_point():
        raise CouplingError(
            f"got A of shape {[*A.shape]} and {A.dtype}, "
            "expected square matrices [*batch, rank, rank]"
        )
    return A


def _broadcast(first: torch.Size, second: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(first, second)
    except RuntimeError:
        return False
    return True
