"""Eigendecompositions of many small symmetric matrices at once, by plane rotations in products (Jacobi's method).

A GPU's own library decomposes one matrix after the other, and the host's cores take as long for a thousand as for everything
else together. Here n/2 rotations of every matrix are done in the same two products; n − 1 such rounds let every pair of
columns meet once, and from sweep to sweep what is left off the diagonal falls quadratically (Brent and Luk, 1985).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SWEEPS = 16  # at most; six to nine are what it takes
SETTLED = 1e-14  # ‖off-diagonal part‖ / ‖H‖, in float64


def eigh_by_rotations(H: Float[Tensor, "batch n n"]) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Eigenvalues and eigenvectors, largest first; NaN for a matrix that has not settled or is not finite.

    Deterministic. Costs some 8 · n · (3 · 2n³) operations a matrix and 16 launches a round, whatever their number.

    Args:
        H: symmetric, in float64.
    """
    batch, n, _ = H.shape
    even = n + n % 2
    # What is added to an odd number of columns meets only zeros, and comes last.
    both = H.new_zeros(batch, 2 * even, even)
    both[:, :n, :n] = H
    size = torch.linalg.matrix_norm(H)
    if even > n:
        both[:, n, n] = -2 * size - 1
    both[:, even:].diagonal(dim1=1, dim2=2).fill_(1)
    rotation = _Rotation(batch, even, H)
    for _ in range(SWEEPS):
        for _ in range(even - 1):
            both = rotation.next(both)
        left = both[:, :even] - torch.diag_embed(both[:, :even].diagonal(dim1=1, dim2=2))
        settled = torch.linalg.matrix_norm(left) <= SETTLED * size
        if bool((settled | ~torch.isfinite(size)).all()):
            break
    values, order = both[:, :even].diagonal(dim1=1, dim2=2).sort(dim=-1, descending=True)
    vectors = both[:, even:].gather(2, order[:, None].expand(-1, even, -1))[:, :n, :n]
    wrong = ~settled
    return values[:, :n].masked_fill(wrong[:, None], torch.nan), vectors.masked_fill(wrong[:, None, None], torch.nan)


class _Rotation:
    """One round: column i of the first half with column i of the second, which then move on to their next partners."""

    def __init__(self, batch: int, n: int, like: Tensor) -> None:
        self.half = n // 2
        self.matrix = like.new_zeros(batch, n * n)
        self.places = _places(n).to(like.device).expand(batch, -1)

    def next(self, both: Float[Tensor, "batch twice n"]) -> Float[Tensor, "batch twice n"]:
        """RᵀHR above VR, from H above V."""
        n, half = both.shape[-1], self.half
        H = both[:, :n]
        diagonal, across = H.diagonal(dim1=1, dim2=2), H[:, :half, half:].diagonal(dim1=1, dim2=2)
        difference = diagonal[:, half:] - diagonal[:, :half]
        # The smaller of the two angles that annul the entry, without which a sweep may undo the one before.
        angle = 0.5 * torch.atan2(torch.copysign(2 * across.abs(), across * difference), difference.abs())
        cosine, sine = angle.cos(), angle.sin()
        self.matrix.scatter_(1, self.places, torch.cat([cosine, -sine, sine, cosine], dim=1))
        R = self.matrix.view(-1, n, n)
        turned = both @ R
        return torch.cat([R.mT @ turned[:, :n], turned[:, n:]], dim=1)


def _places(n: int) -> Int[Tensor, " entries"]:
    """Where the cosines and sines of a round stand in R, whose columns are already those of the next round.

    As in a tournament of n players: the first stays, the others go round the table by one seat.
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
