"""Top singular triplets against a full float64 SVD, and on the spectra that break Gram methods."""

import math

import pytest
import reference
import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import spectra
from lm_eval_coupling.numerics.spectra import (
    angle_bound,
    largest_singular_values,
    numerical_rank,
    relative_gap,
    top_singular,
)

# Half a digit above what float32 rounding leaves; float64 keeps its own.
RESIDUAL = {torch.float32: 1.01e-5, torch.float64: 1.01e-11}
ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-11}
SIGMA = {torch.float32: 1e-5, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(d, seed):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=rng(seed))).Q


def with_spectrum(values, seed=0):
    d = len(values)
    return (
        orthogonal(d, seed)
        @ torch.diag(torch.as_tensor(values, dtype=torch.float64))
        @ orthogonal(d, seed + 1).T
    )


def check(J, k):
    found = top_singular(J, k)
    eye = torch.eye(k, dtype=torch.float64)
    flat = zip(
        *(
            t.reshape(-1, *t.shape[J.ndim - 2 :])
            for t in (J, found.U, found.S, found.V, found.residual)
        ),
        strict=True,
    )
    for j, U, S, V, residual in flat:
        _, S_true, _ = reference.top_singular(j, k)
        S_true = torch.as_tensor(S_true)
        for X in (U.double(), V.double()):
            assert (X.T @ X - eye).abs().max() < ORTHOGONAL[J.dtype]
        assert (S.diff() <= 0).all() and (S >= 0).all()
        floor = torch.finfo(J.dtype).eps * S_true[0] * len(j)
        assert ((S - S_true).abs() <= SIGMA[J.dtype] * S_true + floor).all()
        true_residual = reference.residual(j, U, S, V)
        assert true_residual < RESIDUAL[J.dtype]
        assert float(residual) == pytest.approx(true_residual, abs=RESIDUAL[J.dtype])
    return found


SPECTRA = {
    "random": None,
    "identity": [1.0] * 24,
    "zero": [0.0] * 24,
    "rank one": [3.0] + [0.0] * 23,
    "rank below k": [5.0, 4.0, 3.0] + [0.0] * 21,
    "clustered": [2.0] * 5 + [1.0 + 1e-7 * i for i in range(10)] + [0.5] * 9,
    "flat": [1.0 - 7e-4 * i for i in range(24)],
    "steep": [10.0 ** (-i / 2) for i in range(24)],
    "cliff": [1e4] + [1.0 - 0.01 * i for i in range(23)],
}


@dtypes
@pytest.mark.parametrize("k", [1, 10, 24])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_agree_with_full_svd(name, k, dtype):
    values = SPECTRA[name]
    J = (
        torch.randn(24, 24, dtype=torch.float64, generator=rng())
        if values is None
        else with_spectrum(values)
    )
    check(J.to(dtype), k)


@dtypes
def test_relative_accuracy_of_every_singular_value_on_a_realistic_spectrum(dtype):
    J = with_spectrum([3.0 * (i + 1) ** -0.4 for i in range(200)]).to(dtype)
    S = top_singular(J, 50).S
    S_true = torch.as_tensor(reference.top_singular(J, 50)[1])
    assert ((S - S_true).abs() / S_true).max() < SIGMA[dtype]


@dtypes
def test_batches_have_any_number_of_dimensions_and_mix_kinds(dtype):
    kinds = [with_spectrum(values) for name, values in SPECTRA.items() if values is not None]
    J = torch.stack(kinds).reshape(2, 4, 24, 24).to(dtype)
    found = check(J, 7)
    assert (
        found.U.shape == (2, 4, 24, 7)
        and found.S.shape == (2, 4, 7)
        and found.residual.shape == (2, 4)
    )
    single = top_singular(J[1, 2], 7)
    torch.testing.assert_close(single.S, found.S[1, 2])


@pytest.fixture(params=["cpu", "products"])
def way(request, monkeypatch):
    """By LAPACK, as on a CPU, or by products alone, as on every other device."""
    if request.param == "products":
        monkeypatch.setattr(spectra, "_right_vectors_on_cpu", spectra._right_vectors_on_device)
    return request.param


WIDE = {
    "random": None,
    "flat": [1 - 0.9 * i / 200 for i in range(200)],
    "power": [(1 + i) ** -0.5 for i in range(200)],
    "steep": [10.0 ** (-i / 8) for i in range(200)],
    "clustered": [1.0 if i < 20 else 0.3 - 1e-6 * i for i in range(200)],
    "cliff": [1e3 if i == 0 else 1 - 0.3 * i / 200 for i in range(200)],
    "rank below k": [1.0 / (1 + i) if i < 5 else 0.0 for i in range(200)],
    "identity": [1.0] * 200,
    "zero": [0.0] * 200,
}


@dtypes
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_wide_matrices_of_every_kind_together(way, dtype, scale):
    """Whatever the spectrum and the scale, every matrix of a batch gets the triplets of a full
    float64 SVD.
    """
    kinds = [
        with_spectrum(S) if S else torch.randn(200, 200, dtype=torch.float64, generator=rng())
        for S in WIDE.values()
    ]
    found = check((torch.stack(kinds) * scale).to(dtype), 12)
    again = top_singular((torch.stack(kinds) * scale).to(dtype), 12)
    assert all(torch.equal(getattr(found, name), getattr(again, name)) for name in ("U", "S", "V"))


def test_one_matrix_that_fails_is_done_again_alone(way, monkeypatch):
    """A matrix without a decomposition sent its whole batch to the SVD."""
    name = "leading_right_vectors" if way == "products" else "leading_gram_eigenvectors"
    right, seen = getattr(spectra, name), []

    def broken(J, *rest):
        seen.append(len(J))
        found = right(J, *rest)
        (found[0] if isinstance(found, tuple) else found)[1 if len(J) > 1 else 0] = torch.nan
        return found

    monkeypatch.setattr(spectra, name, broken)
    check(torch.randn(3, 150, 150, generator=rng()), 5)
    assert seen == [3, 1]  # the second in float64, and then by the SVD


@dtypes
@pytest.mark.parametrize("scale", [1e-36, 1e-10, 1e10, 1e36])
def test_scale_does_not_matter(scale, dtype):
    """The Gram matrix of entries of 1e36 overflows float32, and of 1e-36 vanishes."""
    J = torch.randn(16, 16, dtype=dtype, generator=rng())
    found, scaled = top_singular(J, 5), top_singular(J * scale, 5)
    torch.testing.assert_close(scaled.S / scale, found.S, rtol=1e-5, atol=0)
    assert scaled.residual < RESIDUAL[dtype]


@dtypes
def test_the_edges_of_the_number_range_are_finite(dtype):
    """The power of two that undoes a scale of 1e-40 would itself overflow float32."""
    info = torch.finfo(dtype)
    for scale in (info.tiny / 64, info.max / 8):
        found = top_singular(torch.eye(4, dtype=dtype) * scale, 2)
        torch.testing.assert_close(found.S / scale, torch.ones(2, dtype=dtype))
        assert found.residual < RESIDUAL[dtype]


def test_residual_of_a_zero_matrix_is_zero():
    found = top_singular(torch.zeros(2, 8, 8), 3)
    assert (found.residual == 0).all() and (found.S == 0).all()


def test_smallest_and_empty():
    found = top_singular(torch.tensor([[-2.0]]), 1)
    assert found.S.item() == 2 and (found.U * found.V).item() == -1
    assert top_singular(torch.zeros(0, 4, 4), 2).U.shape == (0, 4, 2)


def test_the_input_is_left_alone_and_gradients_are_not_tracked():
    J = torch.randn(4, 4, dtype=torch.float64, generator=rng(), requires_grad=True)
    before = J.detach().clone()
    assert not top_singular(J, 2).S.requires_grad
    assert torch.equal(J, before)


def test_same_input_same_output():
    J = torch.randn(3, 64, 64, generator=rng())
    first, second = top_singular(J, 11), top_singular(J, 11)
    assert torch.equal(first.U, second.U) and torch.equal(first.V, second.V)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_refused(bad):
    J = torch.eye(4)
    J[1, 2] = bad
    with pytest.raises(ValueError, match="got non-finite values"):
        top_singular(J, 2)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_the_dimension_is_refused(k):
    with pytest.raises(ValueError, match=f"got k = {k} .* expected 1 to 4"):
        top_singular(torch.eye(4), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="expected float32 or float64"):
        top_singular(torch.eye(4, dtype=dtype), 2)


@dtypes
def test_relative_gap(dtype):
    S = torch.tensor([[4.0, 3.0, 3.0], [2.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(relative_gap(S, 1), torch.tensor([0.25, 1.0], dtype=dtype))
    gap = relative_gap(S, 2)
    assert gap[0] == 0 and gap[1].isnan()
    assert relative_gap(S, 3).isnan().all()
    for k in (1, 2, 3):
        for found, s in zip(relative_gap(S, k), S, strict=True):
            assert float(found) == pytest.approx(reference.relative_gap(s, k), nan_ok=True)
    with pytest.raises(ValueError, match="got k = 4 with 3"):
        relative_gap(S, 4)


@dtypes
def test_numerical_rank(dtype):
    J = torch.stack(
        [with_spectrum(SPECTRA[name]) for name in ("zero", "rank one", "rank below k", "flat")]
    ).to(dtype)
    assert numerical_rank(top_singular(J, 10).S).tolist() == [0, 1, 3, 10]


@dtypes
def test_the_rank_does_not_depend_on_the_width(dtype):
    """σ below d_model · eps · σ_1 counted as zero: at 4096 that is 5e-4 of the largest."""
    S = torch.tensor([1.0, 1e-2, 3e-4, 1e-5, 0.0], dtype=dtype)
    assert numerical_rank(S) == (3 if dtype == torch.float32 else 4)
    assert numerical_rank(torch.zeros(3, dtype=dtype)) == 0


@dtypes
def test_singular_vectors_are_within_their_bound(dtype):
    """Against a full float64 SVD: clear gaps, small ones, and two equal values of which nothing is
    known.
    """
    values = torch.tensor([5, 4, 3.999, 2, 2, 1, 0.5, 0.25, 0.1, 0], dtype=torch.float64)
    J = with_spectrum(values).to(dtype)
    U, S, Vt = torch.linalg.svd(J.double())
    found = top_singular(J, 10)
    for k in range(1, 11):
        bound = angle_bound(found.S, found.residual, k).item()
        for mine, right in ((found.U[:, k - 1], U[:, k - 1]), (found.V[:, k - 1], Vt[k - 1])):
            sine = (mine.double() - right * (right @ mine.double())).norm().item()
            assert sine <= bound * (1 + 1e-6) + torch.finfo(dtype).eps * 10, k
        if k in (1, 6, 7):
            assert bound < {torch.float32: 1e-3, torch.float64: 1e-9}[dtype]
        assert (bound == 1) == (k in (4, 5)) or k == 10
    with pytest.raises(CouplingError, match="got k = 11 with 10"):
        angle_bound(found.S, found.residual, 11)


def test_a_bound_sees_the_neighbours_on_both_sides():
    S, residual = torch.tensor([[1.0, 0.5, 0.4999]]), torch.tensor([1e-6])
    assert angle_bound(S, residual, 1).item() == pytest.approx(
        2**0.5 * 1e-6 / (0.5 - 2e-6), rel=1e-5
    )
    assert angle_bound(S, residual, 2).item() == pytest.approx(
        2**0.5 * 1e-6 / (1e-4 - 2e-6), rel=1e-3
    )
    assert angle_bound(S[:, :2], residual, 2).item() == pytest.approx(
        2**0.5 * 1e-6 / (0.5 - 2e-6), rel=1e-5
    )


@dtypes
def test_largest_singular_values(dtype):
    kinds = [
        with_spectrum(S) if S else torch.randn(200, 200, dtype=torch.float64, generator=rng())
        for S in WIDE.values()
    ]
    J = torch.stack(kinds).reshape(3, 3, 200, 200).to(dtype)
    expected = torch.linalg.svdvals(J.double())[..., 0]
    assert torch.allclose(largest_singular_values(J).double(), expected, rtol=1e-6, atol=0)
    assert largest_singular_values(J[:0]).shape == (0, 3)
    tiny = torch.finfo(dtype).tiny * 1e6
    assert torch.allclose(
        largest_singular_values(J[0] * tiny).double() / tiny, expected[0], rtol=1e-6
    )
    assert largest_singular_values(J[0, 0, :5, :5]).item() == pytest.approx(
        torch.linalg.svdvals(J[0, 0, :5, :5])[0].item()
    )
