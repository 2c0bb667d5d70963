"""Leading right singular vectors of many matrices at once by Chebyshev-filtered subspace iteration.

A full decomposition grows as d_model³. Here a block of somewhat more than k columns is multiplied
by a polynomial of JᵀJ that is small on the unwanted part of the spectrum and steep on the wanted
part, for all matrices of a batch in the same products. Bases come from Cholesky factors of Gram
matrices in float64. Only matrices of the size of the block are decomposed (Zhou, Saad, Tiago and
Chelikowsky, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_eval_coupling.numerics.gram import small_eigh

GRAM = 2048  # largest width for which JᵀJ is computed once, which halves the products afterwards
PASSES = 30  # filters after which a matrix is left to another method
DEGREE = 16  # of a filter at most
# Largest ratio of a filter's gains on the first and the k-th vector, at first and later. Directions
# that lose by more than float32 can hold would be rounded away. Columns that are nearly
# eigenvectors no longer compete.
SPREAD = {torch.float32: (3e4, 3e5), torch.float64: (1e9, 1e11)}


def block_of(k: int, d_model: int) -> int:
    """Return the number of columns to iterate for k wanted ones.

    More columns make the filter steeper and its small problem more expensive.
    """
    # Small problems, which cost as the fourth power on a device, dominate in a narrow model,
    # products in a wide one.
    spare = 0.25 * k if d_model <= GRAM else 0.5 * k
    return min(d_model, 16 * math.ceil((k + max(spare, 12)) / 16))


def leading_right_vectors(
    J: Float[Tensor, "batch d_model d_model"], k: int, tolerance: float
) -> tuple[Float[Tensor, "batch d_model rank"], Bool[Tensor, " batch"]]:
    """Return orthonormal bases of the top k right singular vectors, and whether each has settled.

    A basis has settled if ‖JᵀJ v − σ² v‖ ≤ ``tolerance`` · σ_1 σ for each vector, or rounding
    allows no less. Deterministic. Costs 10 to 40 products of JᵀJ with :func:`block_of` columns, and
    two to five decompositions of that size.

    Args:
        J: entries of about 1, so that those of JᵀJ neither overflow nor vanish.
        k: number of vectors.
        tolerance: relative, 1e-6 to 1e-5 for float32.
    """
    batch, d_model, _ = J.shape
    V, settled = J.new_zeros(batch, d_model, k), torch.zeros(batch, dtype=torch.bool)
    product, looks = _Product(J), _Looks(batch)
    Q = _start(product, J, block_of(k, d_model))
    filters = 0
    while True:
        GQ = product(Q)
        H = Q.double().mT @ GQ.double()
        # Rotations end far below the allowed residual. The first only give bounds.
        theta, Z = small_eigh(H, 1e-2 if filters == 0 else max(1e-13, tolerance / 50))
        Q, GQ = Q @ Z.to(Q), GQ @ Z.to(Q)
        theta = theta.clamp_min(0)
        excess, noise, *bounds = _look(GQ - Q * theta.to(Q)[:, None], theta, k, tolerance)
        done, hopeless = looks.at(excess, noise)
        ends = done | hopeless | (filters >= PASSES)
        if ends.any():
            ending, going = (which.nonzero().flatten() for which in (ends, ~ends))
            V[looks.active[ending].to(Q.device)] = Q[ending.to(Q.device), :, :k]
            settled[looks.active[done]] = True
            looks.keep(going)
            if not len(going):
                return V, settled.to(J.device)
            bounds, product = [bound[going] for bound in bounds], product.of(going)
            going = going.to(Q.device)
            Q, GQ = Q[going], GQ[going]
        step = _Filter(torch.stack(bounds), SPREAD[J.dtype][filters > 0])
        for turn in range(step.turns(looks.excess)):
            Q = orthonormal(step(product, Q, GQ if turn == 0 else product(Q)))
            filters += 1


def _look(
    difference: Float[Tensor, "batch d_model columns"],
    theta: Float[Tensor, "batch columns"],
    k: int,
    tolerance: float,
) -> Float[Tensor, "5 batch"]:
    """Return how far each matrix is from settled, and bounds for its next filter.

    A device waits for every transfer, so there is one.

    Returns:
        On the host: the largest residual relative to the allowed one, and to that of rounding; the
        first, k-th and last Ritz value.
    """
    residual, first = difference[..., :k].norm(dim=-2).double(), theta[:, :1]
    rounding = torch.finfo(difference.dtype).eps * first
    allowed = torch.maximum(tolerance * (first * theta[:, :k]).sqrt(), 4 * rounding)
    tiny = torch.finfo(torch.float64).tiny
    over = [(residual / part.clamp_min(tiny)).amax(-1) for part in (allowed, 32 * rounding)]
    return torch.stack([*over, theta[:, 0], theta[:, k - 1], theta[:, -1]]).cpu()


class _Looks:
    """Indices of the matrices that have not settled, and their excess at the last look."""

    def __init__(self, batch: int) -> None:
        self.active = torch.arange(batch)
        self.excess = torch.full((batch,), torch.inf, dtype=torch.float64)

    def at(
        self, excess: Tensor, noise: Tensor
    ) -> tuple[Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Return which have settled, and which no longer come closer (or are not numbers)."""
        stuck = ~(excess <= 0.7 * self.excess)
        self.excess = excess
        done = (excess <= 1) | (stuck & (noise <= 1))
        return done, stuck & ~done

    def keep(self, which: Int[Tensor, " some"]) -> None:
        """Go on with ``which`` only."""
        self.active, self.excess = self.active[which], self.excess[which]


def orthonormal(
    Y: Float[Tensor, "batch d_model columns"],
) -> Float[Tensor, "batch d_model columns"]:
    """Orthonormalize columns in their order, by Cholesky twice, in float64."""
    Y64 = Y.double()
    eye = torch.eye(Y.shape[-1], dtype=torch.float64, device=Y.device)
    for _ in range(2):
        Y64 = Y64 / Y64.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        gram = Y64.mT @ Y64
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-14)
        factor, _ = torch.linalg.cholesky_ex(gram)
        # A product with the inverse: a GPU's triangular solver takes one column after the other.
        Y64 = Y64 @ torch.linalg.solve_triangular(factor, eye, upper=False).mT
    return Y64.to(Y.dtype)


class _Product:
    """Product X → JᵀJ X for a batch or for ``some`` of it; wide matrices are not copied."""

    def __init__(
        self,
        J: Float[Tensor, "batch d_model d_model"],
        gram: Tensor | None = None,
        some: list[int] | None = None,
    ) -> None:
        self.J, self.some = J, some
        self.gram = J.mT @ J if gram is None and J.shape[-1] <= GRAM else gram

    def __call__(self, X: Tensor) -> Tensor:
        if self.gram is not None:
            return self.gram @ X
        if self.some is None:
            return self.J.mT @ (self.J @ X)
        return torch.stack(
            [self.J[i].mT @ (self.J[i] @ x) for i, x in zip(self.some, X, strict=True)]
        )

    def recurrence(self, scale: Float[Tensor, "batch 1 1"]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (Y, Z) → 2 (scale · JᵀJ − 1) Y − Z, which is one step where JᵀJ is known."""
        if self.gram is None:
            return lambda Y, Z: 2 * (self(Y) * scale - Y) - Z
        tilted = self.gram * (2 * scale)
        tilted.diagonal(dim1=1, dim2=2).sub_(2)
        return lambda Y, Z: torch.baddbmm(Z, tilted, Y, beta=-1)

    def of(self, which: Int[Tensor, " some"]) -> _Product:
        """Return the product for some of the matrices, whose indices are on the host."""
        if self.gram is not None:
            return _Product(self.J, self.gram[which.to(self.gram.device)])
        some = [i if self.some is None else self.some[i] for i in which.tolist()]
        return _Product(self.J, None, some)


class _Filter:
    """Polynomial p(JᵀJ): |p| ≤ 1 on [0, smallest Ritz value of the block], steep above it.

    Its degree suits each matrix. Coefficients are computed on the host, where the bounds are.
    """

    def __init__(self, bounds: Float[Tensor, "3 batch"], spread: float) -> None:
        first, kth, last = bounds
        self.cut = torch.maximum(last, first * (4 / spread)).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        above_first, above_last = (
            torch.acosh((2 * x / self.cut - 1).clamp_min(1)) for x in (first, kth)
        )
        degree = math.log(spread) / (above_first - above_last).clamp_min(1e-3)
        self.degree = degree.floor().clamp(1, DEGREE)
        self.gain = self.degree * above_last  # log gain of the k-th over the unwanted, per filter
        self.ends = {int(degree) for degree in self.degree.tolist()}

    def turns(self, excess: Float[Tensor, " batch"]) -> int:
        """Return how many filters bring the residual of most matrices down, three at most."""
        needed = excess.log() / self.gain.clamp_min(0.1)
        return int(needed.median().ceil().clamp(1, 3))

    def __call__(self, product: _Product, Q: Tensor, GQ: Tensor) -> Tensor:
        scale = (2 / self.cut).to(Q)[:, None, None]
        degree = self.degree.to(Q)[:, None, None]
        previous, current = Q, GQ * scale - Q
        filtered, advance = current, product.recurrence(scale)
        for step in range(2, max(self.ends) + 1):
            previous, current = current, advance(current, previous)
            if step in self.ends:
                filtered = torch.where(degree == step, current, filtered)
        return filtered


def _start(product: _Product, J: Tensor, columns: int) -> Tensor:
    """Take two steps of the power method from noise; what J takes to zero is kept, but small."""
    noise = torch.randn(
        J.shape[-1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    Q = noise.to(J).expand(len(J), -1, -1)
    for _ in range(2):
        GQ = product(Q)
        size = GQ.norm(dim=-2).mean(-1)[:, None, None] / math.sqrt(J.shape[-1])
        Q = orthonormal(GQ + Q * (1e-3 * size).clamp_min(1e-30))
    return Q
