"""Eigendecompositions of many small symmetric matrices at once, by Jacobi's plane rotations.

n/2 rotations of every matrix are done in the same two products. After n − 1 such rounds, a sweep,
every pair of columns has met once. From sweep to sweep the part off the diagonal falls
quadratically (Brent and Luk, 1985). Whether a GPU's library is faster depends on its version and on
the size: :mod:`.device_eigh` times both.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SWEEPS = 16  # at most; six to nine reach 1e-14


def eigh_by_rotations(
    H: Float[Tensor, "batch n n"], settled_at: float = 1e-14
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Return eigenvalues and eigenvectors, largest first.

    Deterministic. A sweep costs about n · (3 · 2n³) operations per matrix, and 16 launches per
    round for any number of matrices.

    Args:
        H: symmetric up to rounding, in float64, or in float32 where 1e-5 is accurate enough.
        settled_at: ‖off-diagonal part‖ / ‖H‖ at which to stop.

    Returns:
        In the dtype and on the device of H; vectors are columns. NaN for a matrix that has not
        settled or is not finite.
    """
    batch, n, _ = H.shape
    even = n + n % 2
    # A column added to an odd number meets only zeros, and is sorted last.
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
        diagonal = torch.diag_embed(product.diagonal(dim1=1, dim2=2))
        settled = torch.linalg.matrix_norm(product - diagonal) <= settled_at * size
        if bool((settled | ~torch.isfinite(size)).all()):
            break
    values, order = product.diagonal(dim1=1, dim2=2).sort(dim=-1, descending=True)
    vectors = vectors.gather(2, order[:, None].expand(-1, even, -1))[:, :n, :n]
    values = values[:, :n].masked_fill(~settled[:, None], torch.nan)
    return values, vectors.masked_fill(~settled[:, None, None], torch.nan)


class _Rotation:
    """One round of rotations of column i of the first half with column i of the second."""

    def __init__(
        self, product: Float[Tensor, "batch n n"], vectors: Float[Tensor, "batch n n"]
    ) -> None:
        batch, n, _ = product.shape
        self.half = n // 2
        self.R, self.turned = torch.zeros_like(product), torch.empty_like(product)
        self.places = _places(n).to(product.device).expand(batch, -1)
        self.other = torch.empty_like(vectors)  # a product cannot be written over its factor

    def next(
        self, H: Tensor, V: Tensor
    ) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch n n"]]:
        """Return RᵀHR, written over H, and VR."""
        half = self.half
        diagonal, across = H.diagonal(dim1=1, dim2=2), H[:, :half, half:].diagonal(dim1=1, dim2=2)
        difference = diagonal[:, half:] - diagonal[:, :half]
        # The smaller of the two angles that annul the entry, without which a sweep may undo the one
        # before.
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
    """Return the places of cosines, −sines, sines and cosines of a round in the flattened R.

    Columns are paired as in a tournament of n players: the first stays, the others move by one
    seat. R's columns are in the order of the next round.
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
