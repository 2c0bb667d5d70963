"""One prompt from token ids to its record, against naive float64 oracles from end to end; and what it says on failure."""

import math

import cases
import numpy as np
import pytest
import reference
import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians import block_jacobians
from lm_eval_coupling.measure import PromptCoupling, measure_coupling
from lm_eval_coupling.residual import ResidualModel

RANKS = (2, 4)


@pytest.fixture(scope="module")
def model():
    return ResidualModel.wrap(cases.tiny_model("llama", torch.float32))


@pytest.fixture(scope="module")
def record(model):
    return measure_coupling(model, cases.tiny_tokens(9).tolist(), ranks=RANKS, dtype="float64", progress=False)[0]


@pytest.fixture(scope="module")
def naive(model):
    """Every coupling quantity, one pair of layers at a time, from the same Jacobians."""
    J = block_jacobians(model, cases.tiny_tokens(9), dtype=torch.float64).jacobians
    found = {}
    for k in RANKS:
        U, S, V = zip(*(reference.top_singular(j, k) for j in J), strict=True)
        for name, left, right in (("ujv", U, V), ("vju", V, U)):
            A = {(a, b): reference.coupling_matrix(J[a], left[b], right[b]) for a in range(2) for b in range(2)}
            found[name, k] = A, S
        found["overlap", k] = [
            [[reference.subspace_overlap(X[a], X[b]) for b in range(2)] for a in range(2)] for X in (U, V)
        ]
        found["S", k] = S
    return found


def matrix(function, A):
    return np.array([[function(A[a, b], a) for b in range(2)] for a in range(2)])


@pytest.mark.parametrize("index", range(len(RANKS)))
def test_every_quantity_is_the_naive_one(record, naive, index):
    k = RANKS[index]
    A, S = naive["ujv", k]
    A_vju, _ = naive["vju", k]
    expected = {
        "normalized_miscoupling": matrix(lambda a, _: reference.miscoupling(a, True), A),
        "miscoupling": matrix(lambda a, _: reference.miscoupling(a), A),
        "miscoupling_to": matrix(lambda a, i: reference.miscoupling_to(a, S[i]), A),
        "miscoupling_to_absolute": matrix(lambda a, i: reference.miscoupling_to(a, S[i], absolute=True), A),
        "miscoupling_to_trace": matrix(lambda a, i: reference.miscoupling_to(a, S[i], norm="trace"), A),
        "miscoupling_to_vju": matrix(lambda a, i: reference.miscoupling_to(a, S[i]), A_vju),
        "miscoupling_to_absolute_vju": matrix(lambda a, i: reference.miscoupling_to(a, S[i], absolute=True), A_vju),
    }
    for name, values in expected.items():
        assert np.allclose(getattr(record, name)[index], values, rtol=1e-5, atol=1e-6), name
    assert np.allclose(record.subspace_overlap[index], naive["overlap", k], atol=1e-6)
    assert np.allclose(record.singular_values[:, :k], naive["S", k], rtol=1e-6)
    assert record.coupling(k) == pytest.approx(
        1 - expected["normalized_miscoupling"][~np.eye(2, dtype=bool)].mean(), abs=1e-6
    )
    with_diagonal = expected["normalized_miscoupling"] * ~np.eye(2, dtype=bool)
    assert record.coupling(k, diagonal=True) == pytest.approx(1 - with_diagonal.mean(), abs=1e-6)


def test_regularity_is_the_naive_one(model, record):
    trajectory = model.trace(cases.tiny_tokens(9), torch.float64).trajectory(-1)
    assert record.line_shape_score == pytest.approx(reference.line_shape_score(trajectory), rel=1e-6)
    assert record.expodistance == pytest.approx(reference.expodistance(trajectory), rel=1e-6)
    assert np.allclose(record.norms, reference.norms(trajectory), rtol=1e-6)


def test_a_record_survives_its_columns(record):
    again = PromptCoupling.from_columns(record.to_columns() | {"unknown": 1})
    assert again.coupling(2) == record.coupling(2)
    assert again.tokens == record.tokens and again.method == record.method


def test_measures_can_be_chosen(model):
    (regular,) = measure_coupling(model, [[1, 2, 3]], ranks=RANKS, measures=("regularity",), progress=False)
    assert regular.normalized_miscoupling is None and regular.line_shape_score >= 1 and math.isnan(regular.coupling(2))
    (depth,) = measure_coupling(model, [[1, 2, 3]], ranks=RANKS, measures=("depth",), progress=False)
    assert depth.norms is None and depth.coupling(2) > 0


def test_position_chooses_the_token(model):
    tokens = cases.tiny_tokens(9).tolist()[0]
    (third,) = measure_coupling(model, [tokens], ranks=RANKS, position=2, progress=False)
    (alone,) = measure_coupling(model, [tokens[:3]], ranks=RANKS, progress=False)
    assert third.position == alone.position == 2
    assert np.allclose(third.singular_values, alone.singular_values, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "position", "reason"), [([], -1, "prompt of 0 tokens"), ([1, 2], 2, "token 2 of a prompt")]
)
def test_what_cannot_be_measured_says_why(model, tokens, position, reason):
    (found,) = measure_coupling(model, [tokens], ranks=RANKS, position=position, progress=False)
    assert reason in found.reason and math.isnan(found.coupling(2))


def test_one_token_can_be_measured(model):
    (found,) = measure_coupling(model, [[5]], ranks=RANKS, progress=False)
    assert found.reason is None and found.coupling(2) > 0


def test_a_rank_that_was_not_measured_is_refused(record):
    with pytest.raises(CouplingError, match="got rank 3"):
        record.coupling(3)
