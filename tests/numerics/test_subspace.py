"""Subspace iteration by products alone: settled triplets are right, the others are reported."""

import pytest
import torch

from lm_eval_coupling.numerics import device_eigh, gram, subspace
from lm_eval_coupling.numerics.subspace import block_of, leading_right_vectors, orthonormal


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(S, seed=0):
    d = len(S)
    U, V = (
        torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=rng(seed + i)))[0]
        for i in (0, 1)
    )
    return (U * S) @ V.mT


@pytest.fixture(params=["on the host", "rotations", "library"])
def small_problems(request, monkeypatch):
    """Every way to the small eigenproblems, two of them as on a card that is fast in float64."""
    if request.param != "on the host":
        monkeypatch.setattr(gram, "MANY", 0)
        monkeypatch.setattr(gram, "has_fast_float64", lambda device: True)
        ways = {request.param: device_eigh.SOLVERS[request.param]}
        monkeypatch.setattr(device_eigh, "SOLVERS", ways)
        monkeypatch.setattr(device_eigh, "_CHOICES", {})


@pytest.mark.usefixtures("small_problems")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_settled_is_the_leading_subspace(dtype):
    i = torch.arange(150, dtype=torch.float64)
    spectra = [
        1 - 0.9 * i / 150,
        (1 + i) ** -0.5,
        torch.exp(-i / 20),
        torch.where(i < 12, 1.0, 0.3).double(),
        0 * i,
    ]
    J = torch.stack([with_spectrum(S) for S in spectra]).to(dtype)
    tolerance = 5e-6 if dtype == torch.float32 else 5e-12
    V, settled = leading_right_vectors(J, 12, tolerance)
    assert settled.all()
    assert torch.allclose(V.mT @ V, torch.eye(12, dtype=dtype), atol=100 * torch.finfo(dtype).eps)
    found = (J.double() @ V.double()).norm(dim=-2)
    for sizes, S in zip(found, spectra, strict=True):
        assert torch.allclose(sizes.sort(descending=True)[0], S[:12], atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_matrices_are_multiplied_where_they_lie(dtype, monkeypatch):
    """Those still at work were copied, as many times as others had settled; of 70 billion weights a
    card held no copy.
    """
    monkeypatch.setattr(subspace, "GRAM", 0)
    i, right = torch.arange(150, dtype=torch.float64), subspace._Product.of
    spectra = [
        torch.where(i < 12, 1.0, 1e-3).double(),
        1 - 0.9 * i / 150,
        (1 + i) ** -0.5,
        torch.exp(-i / 20),
    ]
    J, some = torch.stack([with_spectrum(S) for S in spectra]).to(dtype), []

    def of(self, which):
        found = right(self, which)
        assert found.J.data_ptr() == J.data_ptr() and found.gram is None
        some.append(found.some)
        return found

    monkeypatch.setattr(subspace._Product, "of", of)
    tolerance = 5e-6 if dtype == torch.float32 else 5e-12
    V, settled = leading_right_vectors(J, 12, tolerance)
    assert settled.all() and some[0] and len(some[-1]) < 4
    for sizes, S in zip((J.double() @ V.double()).norm(dim=-2), spectra, strict=True):
        assert torch.allclose(sizes.sort(descending=True)[0], S[:12], atol=10 * tolerance)


def test_what_cannot_settle_is_said():
    """Values that differ by less than the tolerance asked for, up to the end of the spectrum, and
    no numbers at all.
    """
    i = torch.arange(300, dtype=torch.float64)
    J = torch.stack(
        [with_spectrum(torch.where(i < 5, 1.0, 0.3 - 1e-7 * i)), torch.full((300, 300), torch.nan)]
    )
    _, settled = leading_right_vectors(J, 12, 1e-13)
    assert not settled.any()


def test_a_matrix_comes_out_the_same_beside_others():
    J = torch.randn(4, 96, 96, generator=rng())
    alone, beside = (
        leading_right_vectors(J[2:3], 7, 5e-6)[0][0],
        leading_right_vectors(J, 7, 5e-6)[0][2],
    )
    overlap = torch.linalg.svdvals(alone.double().mT @ beside.double())
    assert torch.allclose(overlap, torch.ones(7, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e7])
def test_bases_are_orthonormal_and_nested(condition):
    """Each column lies in the span of those up to it, however nearly dependent they are."""
    Y = torch.randn(2, 60, 8, dtype=torch.float64, generator=rng())
    Y[..., 1:] = Y[..., :1] + Y[..., 1:] / condition
    Q = orthonormal(Y)
    assert torch.allclose(Q.mT @ Q, torch.eye(8, dtype=torch.float64), atol=1e-9)
    for columns in (1, 4):
        part, basis = Y[..., :columns], Q[..., :columns]
        assert (part - basis @ (basis.mT @ part)).norm() < 1e-7 * part.norm()


def test_blocks_are_somewhat_wider_than_what_is_wanted():
    assert [block_of(k, 4096) for k in (1, 11, 51, 200)] == [16, 32, 80, 304]
    assert block_of(51, 60) == 60
