"""Eigendecompositions by plane rotations, against LAPACK's."""

import pytest
import torch

from lm_eval_coupling.numerics.rotations import eigh_by_rotations


def matrices(n: int) -> torch.Tensor:
    """Plain, zero, the identity, tiny and of low rank, constant, diagonal, nearly equal
    eigenvalues, huge.
    """
    generator = torch.Generator().manual_seed(n)
    A = torch.randn(8, n, n, dtype=torch.float64, generator=generator)
    A = A + A.mT
    A[1], A[2], A[4] = 0, torch.eye(n), 1
    A[3] = 1e-20 * A[3, :, :1] @ A[3, :, :1].mT
    A[5] = torch.diag(torch.arange(n, dtype=torch.float64))
    A[6] = torch.eye(n) + 1e-9 * A[6]
    A[7] *= 1e150
    return A


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_many_matrices_at_once(n, device):
    A = matrices(n).to(device)
    values, vectors = eigh_by_rotations(A)
    size = A.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None]
    assert ((values - torch.linalg.eigvalsh(A).flip(-1)).abs() <= 1e-13 * size).all()
    assert ((A @ vectors - vectors * values[:, None]).norm(dim=1) <= 1e-13 * size).all()
    assert (vectors.mT @ vectors - torch.eye(n, device=device)).abs().max() < 1e-13


def test_what_is_not_finite_is_nan_and_spoils_no_other():
    A = matrices(4)
    A[0, 1, 2] = A[0, 2, 1] = torch.nan
    values, vectors = eigh_by_rotations(A)
    assert values[0].isnan().all() and vectors[0].isnan().all()
    assert torch.isfinite(values[1:]).all() and torch.isfinite(vectors[1:]).all()


def test_the_same_matrices_give_the_same_vectors():
    first, second = eigh_by_rotations(matrices(8))[1], eigh_by_rotations(matrices(8))[1]
    assert torch.equal(first, second)


def test_near_enough_is_soon_enough():
    A = matrices(8)[:1]
    values, vectors = eigh_by_rotations(A.float(), 1e-3)
    assert (values - torch.linalg.eigvalsh(A).flip(-1)).abs().max() <= 1e-3 * A.norm()
    assert torch.allclose(vectors.mT @ vectors, torch.eye(8), atol=1e-5)


def test_rounding_may_differ_across_the_diagonal():
    """A product of two float32 matrices is symmetric to 1e-7 only; what is left of that never
    settled.
    """
    A = matrices(8)[:1]
    askew = A + 1e-7 * torch.randn(
        A.shape, dtype=A.dtype, generator=torch.Generator().manual_seed(9)
    )
    values, _ = eigh_by_rotations(askew)
    assert torch.allclose(
        values, torch.linalg.eigvalsh((askew + askew.mT) / 2).flip(-1), atol=1e-12
    )
