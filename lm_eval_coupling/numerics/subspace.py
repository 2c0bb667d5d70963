"""Leading right singular vectors of a large matrix by products alone: block Lanczos with thick restarts.

A full decomposition grows as d_model³ and keeps a GPU waiting; here a few hundred columns go through J and Jᵀ until the
residuals say that the wanted ones have settled. All is orthogonalised twice against the whole basis, which float32 needs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BLOCKS = 8  # columns of the basis at most, in units of the block
SWEEPS = 12  # restarts after which spectra are left to a full decomposition


def leading_right_vectors(
    J: Float[Tensor, "d_model d_model"], k: int, tolerance: float
) -> Float[Tensor, "d_model rank"] | None:
    """Orthonormal basis of the top k right singular vectors, largest first; None where it has not settled in time.

    Settled means ‖JᵀJ v − σ² v‖ ≤ ``tolerance`` · σ_1 σ for each. Costs one product of J and one of Jᵀ with about 1.3·k
    columns per step, and is deterministic.
    """
    d_model, block = J.shape[-1], k + max(8, k // 4)
    if 2 * block > d_model:
        return None
    columns = min(BLOCKS * block, d_model)
    start = torch.randn(d_model, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(start.to(J))[0]
    JQ = J @ Q
    fresh = slice(0, block)
    for _ in range(SWEEPS):
        while Q.shape[-1] + block <= columns:
            new = _orthogonal(J.mT @ JQ[:, fresh], Q)
            fresh = slice(Q.shape[-1], Q.shape[-1] + block)
            Q, JQ = torch.cat([Q, new], -1), torch.cat([JQ, J @ new], -1)
        # By J itself, not by its Gram matrix, whose small eigenvalues are rounding.
        _, S, Zt = torch.linalg.svd(torch.linalg.qr(JQ)[1])
        Z, S = Zt[:block].mT, S[:block]
        Q, JQ = Q @ Z, JQ @ Z
        residual = J.mT @ JQ - Q * S.square()
        if (residual[:, :k].norm(dim=0) <= tolerance * S[0] * S[:k]).all():
            return Q[:, :k]
        # The residuals of all Ritz vectors span one block: what the next step of the old basis would have added.
        new = _orthogonal(residual, Q)
        Q, JQ, fresh = torch.cat([Q, new], -1), torch.cat([JQ, J @ new], -1), slice(block, 2 * block)
    return None


def _orthogonal(Y: Float[Tensor, "d_model block"], Q: Float[Tensor, "d_model columns"]) -> Float[Tensor, "d_model block"]:
    """An orthonormal basis of Y without what lies in Q."""
    for _ in range(2):
        Y = torch.linalg.qr(Y - Q @ (Q.mT @ Y))[0]
    return Y
