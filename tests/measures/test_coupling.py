"""Coupling matrices and miscoupling against loops, and where the answer is known by hand."""

import math

import numpy as np
import pytest
import reference
import torch

from lm_eval_coupling.measures.formulas.headline import (
    chance_coupling,
    chance_level,
    coupling_of,
    mean_off_diagonal,
)
from lm_eval_coupling.measures.formulas.miscoupling import (
    coupling_matrices,
    coupling_matrix,
    miscoupling,
    miscoupling_to,
    subspace_overlaps,
)
from lm_eval_coupling.numerics.spectra import top_singular

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
LAYERS, D, K = 5, 20, 6
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def orthogonal(d, seed):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def case(request):
    """Return random Jacobians with their triplets, for loops on the same J, U, S, V."""
    J = normal(LAYERS, D, D, dtype=request.param)
    return J, top_singular(J, K)


def assert_matches(found, expected):
    expected = (
        torch.tensor(expected, dtype=torch.float64)
        if not torch.is_tensor(expected)
        else expected.double()
    )
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=TOLERANCE[found.dtype], equal_nan=True
    )


def loop(function, A, *rest, **options):
    return [
        [function(A[a, b], *(r[a] for r in rest), **options) for b in range(A.shape[1])]
        for a in range(A.shape[0])
    ]


def test_all_pairs_against_loops_and_one_by_one(case):
    J, T = case
    A = coupling_matrices(J, T.U, T.V)
    assert A.shape == (LAYERS, LAYERS, K, K)
    assert_matches(A, reference.coupling_matrices(J, T.U, T.V))
    torch.testing.assert_close(coupling_matrix(J[:, None], T.U, T.V), A)
    torch.testing.assert_close(coupling_matrix(J[1], T.U[3], T.V[3]), A[1, 3])


def test_end_to_end_against_the_reference_svd():
    """Compare with triplets and pairs of the oracle: conventions of sign and order cancel."""
    J = normal(LAYERS, D, D)
    T = top_singular(J, K)
    A = coupling_matrices(J, T.U, T.V)
    oracle = [reference.top_singular(j, K) for j in J]
    for a in range(LAYERS):
        for b in range(LAYERS):
            expected = reference.coupling_matrix(J[a], oracle[b][0], oracle[b][2])
            assert_matches(
                miscoupling(A[a, b], normalized=True),
                reference.miscoupling(expected, normalized=True),
            )
            assert_matches(
                miscoupling_to(A[a, b], T.S[a]), reference.miscoupling_to(expected, oracle[a][1])
            )
            assert_matches(A[a, b].diagonal(), expected.diagonal())


def test_first_index_is_the_jacobian_second_the_basis():
    J = torch.stack([torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 3)]).double()
    T = top_singular(J, 3)
    A = coupling_matrices(J, T.U, T.V)
    assert (A[1] == 0).all()
    assert A[0, 0].norm() > 1 and A[0, 1].norm() > 1


def test_the_basis_may_be_of_other_layers():
    J, other = normal(2, D, D), top_singular(normal(3, D, D, seed=1), K)
    A = coupling_matrices(J, other.U, other.V)
    assert A.shape == (2, 3, K, K)
    torch.testing.assert_close(A[1, 2], other.U[2].T @ J[1] @ other.V[2])


def test_a_smaller_rank_is_a_block_of_the_larger(case):
    J, T = case
    A = coupling_matrices(J, T.U, T.V)
    torch.testing.assert_close(coupling_matrices(J, T.U[..., :3], T.V[..., :3]), A[..., :3, :3])


def test_own_basis_gives_the_singular_values(case):
    J, T = case
    A = coupling_matrices(J, T.U, T.V)
    own = A[range(LAYERS), range(LAYERS)]
    torch.testing.assert_close(own, torch.diag_embed(T.S), atol=2e-5, rtol=0)
    assert miscoupling(own, normalized=True).max() < TOLERANCE[A.dtype]
    assert miscoupling_to(own, T.S).max() < TOLERANCE[A.dtype]


def test_joint_signs_of_the_vectors_do_not_matter(case):
    J, T = case
    signs = torch.where(normal(LAYERS, 1, K, seed=3) > 0, 1, -1).to(J.dtype)
    A, B = coupling_matrices(J, T.U, T.V), coupling_matrices(J, T.U * signs, T.V * signs)
    torch.testing.assert_close(A.diagonal(dim1=-2, dim2=-1), B.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(miscoupling(A), miscoupling(B))
    torch.testing.assert_close(miscoupling_to(A, T.S[:, None]), miscoupling_to(B, T.S[:, None]))


def test_miscoupling_against_loops(case):
    J, T = case
    A = coupling_matrices(J, T.U, T.V)
    assert_matches(miscoupling(A), loop(reference.miscoupling, A))
    assert_matches(miscoupling(A, normalized=True), loop(reference.miscoupling, A, normalized=True))


@pytest.mark.parametrize(
    "options",
    [dict(absolute=a, norm=n) for a in (False, True) for n in ("p", "trace")]
    + [dict(p=1), dict(p=math.inf)],
)
def test_miscoupling_to_against_loops(case, options):
    J, T = case
    A = coupling_matrices(J, T.U, T.V)
    assert_matches(
        miscoupling_to(A, T.S[:, None], **options),
        loop(reference.miscoupling_to, A, T.S, **options),
    )
    swapped = coupling_matrices(J, T.V, T.U)
    assert_matches(
        miscoupling_to(swapped, T.S[:, None], **options),
        [
            [
                reference.miscoupling_to(T.V[b].T @ J[a] @ T.U[b], T.S[a], **options)
                for b in range(LAYERS)
            ]
            for a in range(LAYERS)
        ],
    )


def test_by_hand():
    A = torch.tensor([[3.0, 4.0], [0.0, -12.0]]).double()
    S = torch.tensor([3.0, 4.0]).double()
    assert miscoupling(A).item() == 4
    assert miscoupling(A, normalized=True).item() == pytest.approx(4 / 13)
    assert miscoupling_to(A, S).item() == pytest.approx(math.sqrt(16 + 256) / 5)
    assert miscoupling_to(A, S, absolute=True).item() == pytest.approx(math.sqrt(16 + 64) / 5)
    assert miscoupling_to(A, S, norm="trace").item() == pytest.approx(math.sqrt(16 + 256) / 7)
    assert miscoupling_to(A, S, p=1).item() == pytest.approx(math.sqrt(16 + 256) / 7)


def test_symmetric_matrices_have_equal_variants():
    """U and V of a positive definite matrix are the same, so ujv and vju are too."""
    M = normal(LAYERS, D, D)
    J = M @ M.mT
    T = top_singular(J, K)
    torch.testing.assert_close(coupling_matrices(J, T.U, T.V), coupling_matrices(J, T.V, T.U))


def test_vju_of_a_rotation_differs_from_ujv():
    U, V, s = orthogonal(D, 1), orthogonal(D, 2), torch.linspace(2, 1, D).double()
    J = U @ torch.diag(s) @ V.T
    T = top_singular(J, K)
    assert miscoupling(coupling_matrix(J, T.U, T.V), normalized=True) < 1e-10
    assert miscoupling(coupling_matrix(J, T.V, T.U), normalized=True) > 0.5


@dtypes
def test_layers_that_share_singular_vectors_are_perfectly_coupled(dtype):
    U, V = orthogonal(D, 1), orthogonal(D, 2)
    spectra = [torch.linspace(2 + i, 1, D).double() for i in range(LAYERS)]
    J = torch.stack([U @ torch.diag(s) @ V.T for s in spectra]).to(dtype)
    T = top_singular(J, K)
    m = miscoupling(coupling_matrices(J, T.U, T.V), normalized=True)
    assert m.max() < TOLERANCE[dtype]
    torch.testing.assert_close(
        subspace_overlaps(T.U, [K])[0], torch.ones(LAYERS, LAYERS, dtype=dtype)
    )


def test_miscoupling_to_sees_scale_where_the_normalised_one_does_not():
    J = normal(D, D)
    T = top_singular(J, K)
    A = coupling_matrix(-2 * J, T.U, T.V)
    assert miscoupling(A, normalized=True) < 1e-10
    assert miscoupling_to(A, 2 * T.S).item() == pytest.approx(2)
    assert miscoupling_to(A, 2 * T.S, absolute=True).item() == pytest.approx(0, abs=1e-10)


@dtypes
def test_nearly_diagonal_matrices_keep_their_off_diagonal_norm(dtype):
    """‖A‖² − ‖Diag A‖² would give 0 here."""
    A = torch.diag(torch.tensor([1e3, 1e3, 1e3])).to(dtype)
    A[0, 1] = 1e-6
    assert miscoupling(A).item() == pytest.approx(1e-6, rel=1e-5)
    assert miscoupling(A, normalized=True).item() == pytest.approx(1e-9 / math.sqrt(3), rel=1e-5)


def test_tiny_float32_entries_do_not_vanish():
    """Squares of 1e-25 underflow float32, which would make m̃ NaN."""
    A = normal(4, 4, dtype=torch.float32)
    S = torch.tensor([4.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(
        miscoupling(A * 1e-25, normalized=True), miscoupling(A, normalized=True)
    )
    torch.testing.assert_close(miscoupling_to(A * 1e-25, S * 1e-25), miscoupling_to(A, S))


@dtypes
def test_zero_jacobians_are_nan_only_where_undefined(dtype):
    J = normal(3, D, D, dtype=dtype)
    J[1] = 0
    T = top_singular(J, K)
    A = coupling_matrices(J, T.U, T.V)
    m = miscoupling(A, normalized=True)
    assert m[1].isnan().all() and m[[0, 2]].isfinite().all()
    assert (miscoupling(A)[1] == 0).all()
    for options in (dict(), dict(norm="trace"), dict(absolute=True)):
        to = miscoupling_to(A, T.S[:, None], **options)
        assert to[1].isnan().all() and to[[0, 2]].isfinite().all()
    assert math.isfinite(mean_off_diagonal(m.numpy()))


def test_rank_one_basis():
    A = torch.tensor([[-2.0]])
    assert miscoupling(A) == 0 and miscoupling(A, normalized=True) == 0
    assert chance_level(1) == 0
    assert miscoupling_to(A, torch.tensor([2.0])) == 2


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10, 30, 50, 300])
def test_chance_is_the_mean_and_not_the_root_of_the_mean_square(k):
    """√(1 − 1/K) is the root mean square over all pairings: it was shown as the mean."""
    expected = 0 if k == 1 else reference.expected_miscoupling(k)
    assert chance_level(k) == pytest.approx(expected, abs=1e-10)
    assert chance_level(k) < math.sqrt(1 - 1 / k) or k == 1
    if k <= 5:
        A = normal(k, k, seed=k) * torch.linspace(1, 5, k).double()
        mean_square = reference.mean_squared_miscoupling_over_pairings(A)
        assert mean_square == pytest.approx(1 - 1 / k, abs=1e-12)


def test_chance_by_hand_and_in_wide_matrices():
    assert chance_coupling(2) == pytest.approx(1 / 3, abs=1e-12)
    assert chance_coupling(10) == pytest.approx(0.0515802, abs=1e-7)
    assert chance_coupling(4096) * 2 * 4096 == pytest.approx(1, rel=1e-3)


def test_random_layers_are_at_chance():
    J = normal(4, 150, 150)
    T = top_singular(J, 10)
    m = miscoupling(coupling_matrices(J, T.U, T.V), normalized=True).numpy()
    assert mean_off_diagonal(m) == pytest.approx(chance_level(10), abs=0.02)
    assert coupling_of(m) == pytest.approx(chance_coupling(10), abs=0.02)


@pytest.mark.parametrize(("k", "level"), [(10, 0.949), (30, 0.983), (50, 0.990)])
def test_published_chance_levels(k, level):
    assert chance_level(k) == pytest.approx(level, abs=1e-3)


def test_overlaps_against_loops(case):
    _, T = case
    ranks = (1, 3, K)
    for X in (T.U, T.V):
        found = subspace_overlaps(X, ranks)
        for overlap, k in zip(found, ranks, strict=True):
            assert_matches(
                overlap, [[reference.subspace_overlap(a[:, :k], b[:, :k]) for b in X] for a in X]
            )
        assert_matches(found.diagonal(dim1=-2, dim2=-1), torch.ones(len(ranks), LAYERS))


def test_overlap_ignores_rotations_within_the_subspace():
    X, R = orthogonal(D, 0)[:, :K], orthogonal(K, 1)
    bases = torch.stack([X, X @ R, orthogonal(D, 0)[:, K : 2 * K]])
    assert subspace_overlaps(bases, (K,))[0, 0].tolist() == pytest.approx([1, 1, 0], abs=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_mean_over_pairs(diagonal):
    M = normal(3, 4, 4)
    M[0, 1, 2] = M[1] = torch.nan
    found = [mean_off_diagonal(m.numpy(), diagonal) for m in M]
    np.testing.assert_allclose(found, [reference.mean_over_pairs(m, diagonal) for m in M])
    assert math.isnan(found[1]) and math.isfinite(found[0])
    assert coupling_of(M[0].numpy(), diagonal) == 1 - found[0]
    single = mean_off_diagonal(np.array([[0.25]]), diagonal)
    assert single == 0.25 if diagonal else math.isnan(single)


def test_mean_leaves_its_input_alone():
    M = torch.ones(2, 2)
    mean_off_diagonal(M.numpy())
    miscoupling(M)
    assert torch.equal(M, torch.ones(2, 2))


def test_unknown_norm_is_refused():
    with pytest.raises(Exception, match="nuclear"):
        miscoupling_to(torch.eye(2), torch.ones(2), norm="nuclear")


def test_unknown_rank_is_refused():
    with pytest.raises(ValueError, match=r"got ranks \[7\] with 6"):
        subspace_overlaps(orthogonal(D, 0)[None, :, :K], [3, 7])
