"""Eigenvectors on the host's cores are scipy's and torch's; builds that they cannot call are left
alone.
"""

import pytest
import scipy.linalg
import torch

from lm_eval_coupling.numerics import gram
from lm_eval_coupling.numerics.gram import leading_gram_eigenvectors, small_eigh


@pytest.fixture(params=["LAPACK", "torch"])
def by(request, monkeypatch):
    """By scipy's LAPACK, or by torch as where that takes integers of another size."""
    if request.param == "torch":
        monkeypatch.setattr(gram, "_usable", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (7, 7), (40, 11)])
def test_leading_eigenvectors_are_scipys(dtype, size, k, by):
    A = torch.randn(
        3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
    )
    A = A.to(dtype)
    found = leading_gram_eigenvectors(A.mT.contiguous().mT, k).double()
    for vectors, g in zip(found, A.mT.double() @ A.double(), strict=True):
        values = scipy.linalg.eigh(g.numpy(), eigvals_only=True)[::-1][:k].copy()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert torch.allclose(
            g @ vectors, vectors * torch.from_numpy(values), atol=tolerance * values[0]
        )
        assert torch.allclose(
            vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=tolerance
        )


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_small_matrices_are_decomposed_whole(batch, size, by):
    A = torch.randn(
        batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
    )
    H = A + A.mT
    values, vectors = small_eigh(H)
    assert torch.allclose(H @ vectors, vectors * values[:, None], atol=1e-12)
    assert torch.allclose(values, torch.linalg.eigvalsh(H).flip(-1), atol=1e-12)


@pytest.mark.parametrize("function", [small_eigh, lambda J: (leading_gram_eigenvectors(J, 3),)])
def test_what_is_not_finite_spoils_no_other_matrix(function, by):
    good = torch.eye(6, dtype=torch.float64) * torch.arange(1, 7)
    for bad in (torch.nan, torch.inf):
        found = function(torch.stack([good, torch.full_like(good, bad), good]))
        assert all(part[0].isfinite().all() and torch.equal(part[0], part[2]) for part in found)
        assert any(part[1].isnan().any() for part in found)


@pytest.mark.parametrize(
    ("signature", "plain"),
    [
        (b"void (char *, int *, __pyx_t_5scipy_6linalg_13cython_lapack_s *)", True),
        (b"void (char *, int64_t *, __pyx_t_5scipy_6linalg_13cython_lapack_s *)", False),
        (b"void (char *, long *, int *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)", False),
        (
            b"void (char *, __pyx_t_5numpy_int64_t *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)",
            False,
        ),
        (b"void (char *, npy_int64 *)", False),
    ],
)
def test_only_integers_of_32_bits_are_handed_over(signature, plain):
    """LAPACK built with integers of 64 bits would read and write beyond those of 32 bits."""
    assert gram._takes_plain_integers(signature) is plain


def test_this_builds_signatures_are_read():
    assert gram._usable() in (True, False)
    name = gram._signature(gram._capsule("syevr", torch.float32)).decode()
    assert name.startswith("void (") and name.count(",") == 20
