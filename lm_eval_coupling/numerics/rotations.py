"""Eigendecompositions of many small symmetric matrices at once, by plane rotations in products (Jacobi's method).

A GPU's own library decomposes one matrix after the other, and the host's cores take as long for a thousand as for everything
else together. Here n/2 rotations of every matrix are done in the same two products; n − 1 such rounds let every pair of
columns meet once, and from sweep to sweep what is left off the diagonal falls quadratically (Brent and Luk, 1985).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SWEEPS = 16  # at most; six to nine are what it takes to 1e-14


def eigh_by_rotations(
    H: Float[Tensor, "batch n n"], settled_at: float = 1e-14
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Eigenvalues and eigenvectors, largest first; NaN for a matrix that has not settled or is not finite.

    Deterministic. Costs a sweep about n · (3 · 2n³) operations a matrix, and 16 launches a round whatever their number.

    Args:
        H: symmetric but for rounding, in float64, or in float32 where 1e-5 is near enough.
        settled_at: ‖off-diagonal part‖ / ‖H‖ at which to stop.

    Returns:
        In the dtype and on the device of H; vectors are columns.
    """
    batch, n, _ = H.shape
    even = n + n % 2
    # What is added to an odd number of columns meets only zeros, and comes last.
    product = H.new_zeros(batch, even, even)
    product[:, :n, :n] = (H + H.mT) / 2
    size = torch.linalg.matrix_norm(product)
    if even > n:
        product[:, n, n] = -2 * size - 1
    state = product, torch.eye(even, dtype=H.dtype, device=H.device).repeat(batch, 1, 1)
    rotation = _Rotation(*state)
    for _ in range(SWEEPS):
        for _ in range(even - 1):
            state = rotation.next(*state)
        product, vectors = state
        left = torch.linalg.matrix_norm(
            product - torch.diag_embed(product.diagonal(dim1=1, dim2=2))
        )
        settled = left <= settled_at * size
        if bool((settled | ~torch.isfinite(size)).all()):
            break
    values, order = product.diagonal(dim1=1, dim2=2).sort(dim=-1, descending=True)
    vectors = vectors.gather(2, order[:, None].expand(-1, even, -1))[:, :n, :n]
    wrong = ~settled
    return values[:, :n].masked_fill(wrong[:, None], torch.nan), vectors.masked_fill(
        wrong[:, None, None], torch.nan
    )


class _Rotation:
    """One round: column i of the first half with column i of the second, which then move on to their next partners."""

    def __init__(
        self, product: Float[Tensor, "batch n n"], vectors: Float[Tensor, "batch n n"]
    ) -> None:
        batch, n, _ = product.shape
        self.half = n // 2
        self.R, self.turned = torch.zeros_like(product), torch.empty_like(product)
        self.places = _places(n).to(product.device).expand(batch, -1)
        self.other = torch.empty_like(vectors)  # a second buffer: what is read is not written

    def next(
        self, H: Tensor, V: Tensor
    ) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch n n"]]:
        """RᵀHR in place of H, and VR."""
        half = self.half
        diagonal, across = H.diagonal(dim1=1, dim2=2), H[:, :half, half:].diagonal(dim1=1, dim2=2)
        difference = diagonal[:, half:] - diagonal[:, :half]
        # The smaller of the two angles that annul the entry, without which a sweep may undo the one before.
        angle = 0.5 * torch.atan2(
            torch.copysign(2 * across.abs(), across * difference), difference.abs()
        )
        cosine, sine = angle.cos(), angle.sin()
        self.R.flatten(1).scatter_(1, self.places, torch.cat([cosine, -sine, sine, cosine], dim=1))
        torch.bmm(H, self.R, out=self.turned)
        torch.bmm(self.R.mT, self.turned, out=H)
        torch.bmm(V, self.R, out=self.other)
        self.other, V = V, self.other
        return H, V


def _places(n: int) -> Int[Tensor, " entries"]:
    """Where the cosines and sines of a round stand in R, whose columns are already those of the next round.

    As in a tournament of n players: the first stays, the others go round the table by one seat.

    Returns:
        Indices of R read row by row: of the n/2 cosines, −sines, sines and cosines.
    """
    half = n // 2
    ring = [*range(1, half), *range(n - 1, half - 1, -1)]
    seat = {0: 0} | {player: ring[(i + 1) % len(ring)] for i, player in enumerate(ring)}
    first, second = range(half), range(half, n)
    entries = [
        *(i * n + seat[i] for i in first),  # cos
        *(j * n + seat[i] for i, j in zip(first, second, strict=True)),  # −sin
        *(i * n + seat[j] for i, j in zip(first, second, strict=True)),  # sin
        *(j * n + seat[j] for j in second),  # cos
    ]
    return torch.tensor(entries)
