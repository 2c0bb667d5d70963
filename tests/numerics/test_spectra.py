"""Top singular triplets against a full float64 SVD, and on the spectra that break Gram methods."""

import math

import pytest
import reference
import scipy.linalg
import torch

from lm_eval_coupling.numerics import spectra
from lm_eval_coupling.numerics import subspace as krylov
from lm_eval_coupling.numerics.gram import leading_gram_eigenvectors
from lm_eval_coupling.numerics.spectra import numerical_rank, relative_gap, top_singular

# Half a digit above what float32 rounding leaves; float64 keeps its own.
RESIDUAL = {torch.float32: 1.01e-5, torch.float64: 1.01e-11}
ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-11}
SIGMA = {torch.float32: 1e-5, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(d, seed):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=rng(seed))).Q


def with_spectrum(values, seed=0):
    d = len(values)
    return orthogonal(d, seed) @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ orthogonal(d, seed + 1).T


def check(J, k):
    found = top_singular(J, k)
    eye = torch.eye(k, dtype=torch.float64)
    flat = zip(*(t.reshape(-1, *t.shape[J.ndim - 2 :]) for t in (J, found.U, found.S, found.V, found.residual)), strict=True)
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
    J = torch.randn(24, 24, dtype=torch.float64, generator=rng()) if values is None else with_spectrum(values)
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
    assert found.U.shape == (2, 4, 24, 7) and found.S.shape == (2, 4, 7) and found.residual.shape == (2, 4)
    single = top_singular(J[1, 2], 7)
    torch.testing.assert_close(single.S, found.S[1, 2])


@dtypes
def test_the_svd_takes_over_where_the_gram_path_fails(dtype, monkeypatch):
    def broken(J, k):
        nan = J.new_full((len(J), J.shape[-1], k), torch.nan)
        return nan, nan[:, 0].clone(), nan.clone()

    monkeypatch.setattr(spectra, "_by_gram", broken)
    check(torch.randn(3, 12, 12, dtype=dtype, generator=rng()), 5)


def test_an_eigensolver_that_does_not_converge_is_survived(monkeypatch):
    def fails(_):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    check(torch.randn(3, 12, 12, dtype=torch.float64, generator=rng()), 5)


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
    J = torch.stack([with_spectrum(SPECTRA[name]) for name in ("zero", "rank one", "rank below k", "flat")]).to(dtype)
    assert numerical_rank(top_singular(J, 10).S, 24).tolist() == [0, 1, 3, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (7, 7), (40, 11)])
def test_leading_eigenvectors_are_scipys(dtype, size, k):
    A = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    A = A.to(dtype)
    found = leading_gram_eigenvectors(A.mT.contiguous().mT, k).double()
    for vectors, g in zip(found, A.mT.double() @ A.double(), strict=True):
        values = scipy.linalg.eigh(g.numpy(), eigvals_only=True)[::-1][:k].copy()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert torch.allclose(g @ vectors, vectors * torch.from_numpy(values), atol=tolerance * values[0])
        assert torch.allclose(vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", ["flat", "power", "clustered", "rank-deficient"])
def test_products_alone_find_the_same_vectors(monkeypatch, dtype, decay):
    """As on a GPU for large matrices; whatever the spectrum, the triplets are those of a full float64 SVD."""
    d_model, k = 150, 12
    i = torch.arange(d_model, dtype=torch.float64)
    S = {
        "flat": 1 - 0.9 * i / d_model,
        "power": (1 + i) ** -0.5,
        "clustered": torch.where(i < 20, 1.0, 0.3) - 1e-6 * i,
        "rank-deficient": torch.where(i < 5, 1.0 / (1 + i), 0.0),
    }[decay]
    U, V = (torch.linalg.qr(torch.randn(d_model, d_model, dtype=torch.float64, generator=rng(seed)))[0] for seed in (1, 2))
    J = ((U * S) @ V.mT).to(dtype)
    basis = krylov.leading_right_vectors(J, k, spectra.TOLERANCE[dtype] / 2)
    if decay != "rank-deficient":  # vectors of zeros never settle
        assert basis is not None
        size = (J.double() @ basis.double()).norm() / S[:k].norm()
        assert abs(size - 1) < 1e-5
    monkeypatch.setattr(
        spectra, "_leading_right_vectors", lambda J, k: torch.stack([spectra._without_decomposition(j, k) for j in J])
    )
    found = top_singular(J, k)
    assert torch.allclose(found.S.double(), S[:k], rtol=0, atol=2 * SIGMA[dtype])
    assert found.residual < RESIDUAL[dtype]


def test_products_alone_say_when_they_have_not_settled():
    assert krylov.leading_right_vectors(torch.randn(60, 60, generator=rng()), 40, 1e-6) is None  # no room for two blocks
    assert krylov.leading_right_vectors(torch.randn(200, 200, generator=rng()), 3, 0.0) is None
