"""Controls of coupling: against loops and random rotations, by hand, and at the edges."""

import math
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import reference
import torch

from lm_eval_coupling import block_jacobians
from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.jacobians.engine import BlockJacobians
from lm_eval_coupling.measures.formulas import ablations
from lm_eval_coupling.measures.formulas.headline import (
    chance_coupling,
    chance_one_pair,
    chance_rotated,
)
from lm_eval_coupling.measures.formulas.miscoupling import coupling_matrices, miscoupling
from lm_eval_coupling.measures.registry import prompt_readings, readings, registered_measures
from lm_eval_coupling.measuring.batch import Batch
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.spectra import top_singular
from lm_eval_coupling.residual import ResidualModel

D, LAYERS, RANKS = 12, 4, (2, 3, 5)
CONTROLS = ("depth", "controls", "without_identity")


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def rotations(count, k, seed=0):
    """Haar-random: QR of Gaussian matrices with the signs of R's diagonal."""
    Q, R = torch.linalg.qr(normal(count, k, k, seed=seed))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def svd(J):
    U, S, Vt = torch.linalg.svd(J.double())
    return U, S, Vt.mT


class GivenJacobians(Batch):
    """A batch of one prompt with these Jacobians, past the engine."""

    def __init__(self, J, settings):
        self.settings, self._triplets = settings, {}
        self.model = SimpleNamespace(
            d_model=J.shape[-1], n_layers=len(J), device=torch.device("cpu")
        )
        self.tokens, self.positions = [[1, 2, 3]], [2]
        stream = torch.ones(1, 3, J.shape[-1], dtype=J.dtype)
        self.traces = [SimpleNamespace(calls=[None] * len(J), resid_final=stream)]
        layers = [*range(len(J))]
        certificate = torch.zeros(len(J))
        self.blocks = [BlockJacobians(J, certificate, ["closed"] * len(J), layers, J.device)]


def measured(J, ranks, measures=CONTROLS, dtype="float64"):
    settings = Settings(tuple(ranks), measures, dtype)
    batch = GivenJacobians(J.to(DTYPES[dtype]), settings)
    known = registered_measures()
    results = {name: known[name].cast(known[name].run(batch)[0]) for name in settings.measures}
    return PromptCoupling((1, 2, 3), 2, settings.ranks, results)


def naive_pairs(J, K):
    """Every control of all pairs at one K, one number at a time, from full SVDs."""
    U, S, V = svd(J)
    shape = (len(J), len(J))
    names = ("rotated", "one_pair", "deflated", "negative_share", "signed_coupling")
    found = {name: np.full(shape, np.nan) for name in names}
    Q = rotations(100_000, K, seed=K)
    for a in range(len(J)):
        rest = J[a] - S[a, 0] * torch.outer(U[a][:, 0], V[a][:, 0])
        for b in range(len(J)):
            A = U[b][:, :K].T @ J[a] @ V[b][:, :K]
            turned = Q.mT @ A @ Q
            off = turned.square().sum((1, 2)) - turned.diagonal(dim1=1, dim2=2).square().sum(1)
            size = math.sqrt(sum(float(x) ** 2 for x in A.flatten()))
            found["rotated"][a, b] = math.sqrt(float(off.mean())) / size
            found["one_pair"][a, b] = float(A[0, 0]) ** 2 / size**2
            B = U[b][:, 1 : K + 1].T @ rest @ V[b][:, 1 : K + 1]
            found["deflated"][a, b] = reference.miscoupling(B, normalized=True)
            found["negative_share"][a, b] = sum(float(A[k, k]) < 0 for k in range(K)) / K
            found["signed_coupling"][a, b] = float(A.trace()) / math.sqrt(K) / size
    return found


def test_every_column_against_loops_and_random_rotations():
    J = normal(LAYERS, D, D) - 0.7 * torch.eye(D, dtype=torch.float64)
    record = measured(J, RANKS)
    assert record.reason is None
    for i, K in enumerate(RANKS):
        for name, expected in naive_pairs(J, K).items():
            tolerance = 2e-3 if name == "rotated" else 2e-6
            np.testing.assert_allclose(record[name][i], expected, atol=tolerance, err_msg=name)
    U, S, V = svd(J)
    cosines = [[float(U[a][:, k] @ V[a][:, k]) for k in range(5)] for a in range(LAYERS)]
    np.testing.assert_allclose(record.erasing, cosines, atol=1e-6)
    shares = [float(j.trace()) / math.sqrt(D) / float(j.norm()) for j in J]
    np.testing.assert_allclose(record.trace_share, shares, atol=1e-6)
    bare = torch.stack([j - j.trace() / D * torch.eye(D, dtype=torch.float64) for j in J])
    alone = measured(bare, RANKS, ("depth",))
    np.testing.assert_allclose(record.without_identity, alone.normalized_miscoupling, atol=1e-5)
    np.testing.assert_allclose(
        record.without_identity_singular_values, alone.singular_values, rtol=1e-6
    )


def test_readings_are_means_over_different_layers():
    J = normal(LAYERS, D, D, seed=1)
    record = measured(J, RANKS)
    apart = ~np.eye(LAYERS, dtype=bool)
    known = readings()
    for i, K in enumerate(RANKS):
        for name in ("rotated", "deflated", "without_identity"):
            expected = 1 - record[name][i][apart].mean(dtype=np.float64)
            assert known[name].read(record, K) == pytest.approx(expected, abs=1e-6)
        for name in ("one_pair", "negative_share", "signed_coupling"):
            expected = record[name][i][apart].mean(dtype=np.float64)
            assert known[name].read(record, K) == pytest.approx(expected, abs=1e-6)
        expected = record.erasing[:, :K].mean(dtype=np.float64)
        assert known["erasing"].read(record, K) == pytest.approx(expected, abs=1e-6)
    names = {reading.name for reading in prompt_readings()}
    assert {"rotated", "one_pair", "deflated", "without_identity", "erasing"} <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_common_rotation_changes_coupling_and_not_rotated(dtype):
    A = normal(3, 6, 6, dtype=dtype) + 2 * torch.eye(6, dtype=dtype)
    Q = rotations(1, 6)[0].to(dtype)
    before, after = A, Q.mT @ A @ Q
    torch.testing.assert_close(
        ablations.rotated_miscoupling(before), ablations.rotated_miscoupling(after)
    )
    assert (
        miscoupling(before, normalized=True) - miscoupling(after, normalized=True)
    ).norm() > 0.01


def test_rotated_by_hand():
    def rotated(A):
        return ablations.rotated_miscoupling(torch.as_tensor(A, dtype=torch.float64)).item()

    # A multiple of the identity stays one; what is antisymmetric has no diagonal in any basis.
    assert rotated(np.eye(4) * -3) == 0
    assert rotated([[0, 1], [-1, 0]]) == 1
    # diag(1, −1): m̃ is |sin 2φ|, whose mean square is 1/2.
    assert rotated(np.diag([1, -1])) == pytest.approx(math.sqrt(1 / 2), abs=1e-15)
    # Rank one of K: E(Σ q⁴) = 3/(K + 2).
    assert rotated(np.diag([1, 0, 0, 0])) == pytest.approx(math.sqrt(1 - 3 / 6), abs=1e-15)


def test_nearly_a_multiple_of_the_identity_keeps_its_digits():
    A = torch.eye(5, dtype=torch.float64)
    A[0, 1] = 1e-12
    assert ablations.rotated_miscoupling(A).item() == pytest.approx(
        1e-12 * math.sqrt((1 / 14) * 2 / 5 + (5 / 7) / 5), rel=1e-3
    )


def test_tiny_float32_entries_do_not_vanish():
    A = normal(4, 4, dtype=torch.float32)
    for function in (ablations.rotated_miscoupling, ablations.one_pair, ablations.signed_coupling):
        torch.testing.assert_close(function(A * 1e-25), function(A))


def test_identity_and_noise():
    """Blocks that share −c·I alone are coupled, erase, and are at chance without it."""
    noise = normal(LAYERS, 60, 60) / math.sqrt(60)
    J = noise - 3 * torch.eye(60, dtype=torch.float64)
    record, K = measured(J, [5]), 5
    known = readings()
    assert record.coupling(K) > 0.4 and known["rotated"].read(record, K) > 0.4
    assert known["without_identity"].read(record, K) == pytest.approx(chance_coupling(K), abs=0.05)
    assert record.trace_share.max() < -0.9 and record.erasing.max() < -0.8
    # Of two blocks that both erase, each has the sign of the other; of one that adds it has not.
    assert known["negative_share"].read(record, K) == 0
    assert known["signed_coupling"].read(record, K) > 0.4
    opposite = measured(J * torch.tensor([1, -1]).repeat(2)[:, None, None], [K])
    assert opposite.signed_coupling[0, 0, 1] < -0.4 and opposite.negative_share[0, 0, 1] == 1


def test_one_shared_direction_is_what_deflation_removes():
    u, v = normal(60, seed=1), normal(60, seed=2)
    shared = 30 * torch.outer(u / u.norm(), v / v.norm())
    record = measured(normal(LAYERS, 60, 60) / math.sqrt(60) + shared, [5])
    known = readings()
    assert record.coupling(5) > 0.8 and known["one_pair"].read(record, 5) > 0.95
    assert known["deflated"].read(record, 5) == pytest.approx(chance_coupling(5), abs=0.05)


def test_permuted_pairs_keep_rotated_above_chance_where_coupling_is_gone():
    """Every block maps v_k to u_k of the same subspaces, with another order of magnitudes."""
    U, V = rotations(2, 40, seed=5)
    values = torch.linspace(10, 9, 5).double()
    turn = [rotations(1, 5, seed=seed)[0] for seed in range(LAYERS)]
    J = torch.stack(
        [U[:, :5] @ T @ torch.diag(values) @ T.T @ V[:, :5].T for T in turn]
    ) + 1e-3 * normal(LAYERS, 40, 40)
    record = measured(J, [5])
    assert readings()["rotated"].read(record, 5) > 0.8
    shuffled = torch.stack(
        [
            U[:, :5]
            @ torch.diag(values)
            @ torch.eye(5).double()[[*range(s, 5), *range(s)]]
            @ V[:, :5].T
            for s in range(4)
        ]
    ) + 1e-3 * normal(LAYERS, 40, 40)
    record = measured(shuffled, [5])
    assert readings()["rotated"].read(record, 5) < 0.35


@pytest.mark.parametrize("K", [2, 3, 5, 10])
def test_chance_is_that_of_gaussian_matrices(K):
    A = normal(100_000, K, K, seed=K)
    for function, chance in (
        (ablations.rotated_miscoupling, chance_rotated(K)),
        (lambda A: miscoupling(A, normalized=True), chance_coupling(K)),
    ):
        values = 1 - function(A)
        assert float(values.mean()) == pytest.approx(chance, abs=4 * float(values.std()) / 316)
    values = ablations.one_pair(A)
    assert float(values.mean()) == pytest.approx(
        chance_one_pair(K), abs=4 * float(values.std()) / 316
    )
    assert float(ablations.negative_share(A).mean()) == pytest.approx(0.5, abs=0.005)
    assert float(ablations.signed_coupling(A).mean()) == pytest.approx(0, abs=0.005)


PAIR_COLUMNS = ("rotated", "one_pair", "deflated", "negative_share", "signed_coupling")
SCALARS = ("rotated_coupling", "mean_one_pair", "deflated_coupling", "without_identity_coupling")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("c", [1.0, -0.37])
def test_an_exact_multiple_of_the_identity_has_nothing_besides(dtype, c):
    J = torch.stack([c * (i + 1) * torch.eye(6, dtype=torch.float64) for i in range(3)])
    J[2] += 1e-9 * normal(6, 6)  # rounding, not a matrix
    record = measured(J, [2], dtype=dtype)
    if dtype == "float32":
        assert np.isnan(record.without_identity).all()
    assert np.isnan(record.without_identity[0, :2]).all()
    assert "zero_or_low_rank" in record.reason_codes
    np.testing.assert_allclose(record.trace_share, np.sign(c), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rank_one_leaves_nothing_after_deflation(dtype):
    J = torch.stack([torch.outer(normal(D, seed=i), normal(D, seed=9 + i)) for i in range(3)])
    record = measured(J, [1, 2], dtype=dtype)
    assert np.isnan(record.deflated).all() and "zero_or_low_rank" in record.reason_codes
    assert all(np.isnan(record[name]).all() for name in PAIR_COLUMNS)
    assert np.isfinite(record.erasing[:, 0]).all() and np.isnan(record.erasing[:, 1]).all()
    # A full block beside one of rank one: only pairs with a deflated number on both sides have one.
    mixed = torch.stack([J[0], normal(D, D), normal(D, D, seed=7)])
    record = measured(mixed, [2], dtype=dtype)
    assert np.isnan(record.deflated[0, 0]).all() and np.isnan(record.deflated[0, :, 0]).all()
    assert np.isfinite(record.deflated[0, 1:, 1:]).all()


def test_k_1_and_k_d_and_d_2_are_undefined_and_say_so():
    record = measured(normal(3, 2, 2), [1, 2])
    assert record.reason_codes == ("undefined",) and "K = 1" in record.reason
    assert "K = d_model = 2" in record.reason
    for name in (*PAIR_COLUMNS, "without_identity"):
        assert np.isnan(record[name][0]).all(), name
    for name in SCALARS:
        assert math.isnan(record[name][0]), name
    assert np.isnan(record.deflated).all()
    assert np.isfinite(record.rotated[1]).all() and np.isfinite(record.signed_coupling[1]).all()


def test_rank_of_exactly_k_has_no_deflated_number():
    U, V = rotations(2, D, seed=3)
    J = torch.stack([U[:, :3] @ normal(3, 3, seed=i) @ V[:, :3].T for i in range(3)])
    record = measured(J, [2, 3])
    assert np.isfinite(record.deflated[0]).all() and np.isnan(record.deflated[1]).all()
    assert np.isfinite(record.rotated).all() and "zero_or_low_rank" in record.reason_codes


def test_zero_jacobians():
    J = normal(3, D, D)
    J[1] = 0
    record = measured(J, [2])
    for name in (*PAIR_COLUMNS, "without_identity"):
        assert np.isnan(record[name][0][1]).all() and np.isnan(record[name][0][:, 1]).all(), name
        assert np.isfinite(record[name][0][[0, 2]][:, [0, 2]]).all(), name
    assert np.isnan(record.trace_share[1]) and np.isnan(record.erasing[1]).all()
    assert "zero_or_low_rank" in record.reason_codes
    assert all(math.isfinite(record[name][0]) for name in SCALARS)
    everything = measured(torch.zeros(3, D, D).double(), [2])
    assert all(math.isnan(everything[name][0]) for name in SCALARS)


def test_one_block():
    record = measured(normal(1, D, D), [2])
    assert record.reason_codes == ("one_layer",)
    assert all(math.isnan(record[name][0]) for name in SCALARS)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_model_is_measured_as_its_jacobians_are(case):
    model = ResidualModel.wrap(cases.tiny_model(case))
    prompt = cases.tiny_tokens(5)[0].tolist()
    J = block_jacobians(model, torch.tensor([prompt]), dtype=torch.float64).jacobians
    (record,) = measure_coupling(
        model, [prompt], ranks=[2, 3], measures=CONTROLS, dtype="float64", progress=False
    )
    expected = measured(J, [2, 3])
    for name in (*PAIR_COLUMNS, "without_identity", "erasing", "trace_share"):
        np.testing.assert_allclose(record[name], expected[name], atol=1e-5, err_msg=name)


def test_triplets_of_float32_change_nothing():
    J = normal(LAYERS, D, D) - torch.eye(D, dtype=torch.float64)
    wide, narrow = measured(J, RANKS), measured(J, RANKS, dtype="float32")
    for name in (*PAIR_COLUMNS, "without_identity", "erasing", "trace_share"):
        np.testing.assert_allclose(narrow[name], wide[name], atol=2e-4, err_msg=name)


def test_deflation_is_that_of_the_matrix():
    J = normal(LAYERS, D, D)
    T = top_singular(J, 6)
    A = coupling_matrices(J, T.U, T.V)
    found = ablations.deflated_miscoupling(A, T, (5,))[0]
    rest = J - T.S[:, :1, None] * T.U[..., :1] @ T.V[..., :1].mT
    expected = miscoupling(coupling_matrices(rest, T.U[..., 1:], T.V[..., 1:]), normalized=True)
    torch.testing.assert_close(found, expected)
