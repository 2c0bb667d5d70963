"""α-ReQ and RankMe: closed forms, a naive oracle, and simulations whose exponent is known."""

import math

import cases
import numpy as np
import pytest

from lm_eval_coupling.measures.formulas import spread
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.task_summary import summarize
from lm_eval_coupling.saved.task_rows import mean_over_tasks


def naive_alpha(X):
    """Covariance entry by entry, its eigenvalues, and a line through them one by one."""
    n, d = X.shape
    means = [sum(X[i][j] for i in range(n)) / n for j in range(d)]
    covariance = [
        [sum((X[i][a] - means[a]) * (X[i][b] - means[b]) for i in range(n)) / n for b in range(d)]
        for a in range(d)
    ]
    values = sorted(np.linalg.eigvalsh(covariance), reverse=True)[: min(n - 1, d)]
    points = [(math.log(i), math.log(values[i - 1])) for i in range(4, len(values) // 2 + 1)]
    slope, _ = np.polyfit(*zip(*points, strict=True), 1)
    return -slope


def naive_rank(X):
    values = [math.sqrt(max(v, 0)) for v in np.linalg.eigvalsh(X.T @ X)]
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("shape", [(30, 12), (24, 40), (25, 24)])
def test_numbers_are_those_of_the_naive_oracle(shape):
    X = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.7 + 2.0
    assert spread.alpha_req(X) == pytest.approx(naive_alpha(X), rel=1e-9)
    assert spread.rank_me(X) == pytest.approx(naive_rank(X), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_an_exact_power_law_has_its_exponent(alpha, shape):
    n, d = shape
    rng = np.random.default_rng(1)
    m = min(n - 1, d)
    U = np.linalg.qr(np.column_stack([np.ones(n), rng.normal(size=(n, m))]))[0][:, 1:]
    V = np.linalg.qr(rng.normal(size=(d, m)))[0]
    X = U * np.arange(1, m + 1) ** (-alpha / 2) @ V.T + rng.normal(size=d)
    assert spread.alpha_req(X) == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.8, 1.2])
def test_a_sample_of_a_power_law_has_about_its_exponent(alpha):
    """The estimate from 100 documents is within a fifth of the truth, a little too steep."""
    deviations = np.arange(1, 301) ** (-alpha / 2)
    estimates = [
        spread.alpha_req(np.random.default_rng(seed).normal(size=(100, 300)) * deviations)
        for seed in range(20)
    ]
    assert abs(np.mean(estimates) - alpha) < 0.25 * alpha and np.std(estimates) < 0.1


def test_rank_of_equal_and_of_single_directions():
    assert spread.rank_me(np.eye(5, 8) * 3) == pytest.approx(5)
    assert spread.rank_me(np.outer(np.arange(1, 7.0), np.ones(4))) == pytest.approx(1, abs=1e-6)


def test_what_has_no_spread_is_undefined():
    assert math.isnan(spread.alpha_req(np.ones((30, 8))))
    assert math.isnan(spread.rank_me(np.zeros((30, 8))))
    broken = np.ones((30, 8))
    broken[3, 2] = np.inf
    assert math.isnan(spread.alpha_req(broken)) and math.isnan(spread.rank_me(broken))


@pytest.fixture(scope="module")
def records():
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    prompts = [[1 + i, 2 + i % 7, 3, 4 + i % 11] for i in range(24)]
    return model, measure_coupling(
        model, prompts, ranks=2, measures="representations", progress=False
    )


def test_the_representation_is_the_state_after_the_last_block(records):
    model, of_prompts = records
    for record in of_prompts[:2]:
        trace = model.trace(list(record.tokens))
        np.testing.assert_allclose(
            record.representation, trace.resid_final[0, -1], rtol=1e-5, atol=1e-6
        )


def test_a_task_is_summarized_over_its_documents(records):
    _, of_prompts = records
    X = np.stack([record.representation for record in of_prompts]).astype(float)
    summary = summarize({i: [record] for i, record in enumerate(of_prompts)}, (2,))["measures"]
    assert summary["rankme"]["mean"] == pytest.approx(naive_rank(X), rel=1e-5)
    assert summary["alpha_req"]["mean"] == pytest.approx(naive_alpha(X), rel=1e-4)
    left_out = [naive_rank(X[np.arange(24) % 20 != group]) for group in range(20)]
    error = math.sqrt(19 / 20 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
    assert summary["rankme"]["stderr"] == pytest.approx(error, rel=1e-3)
    assert summary["rankme"]["n"] == 24
    few = summarize({i: [record] for i, record in enumerate(of_prompts[:19])}, (2,))["measures"]
    assert math.isnan(few["rankme"]["mean"]) and few["rankme"]["n"] == 19


def test_a_document_of_several_prompts_has_their_mean(records):
    _, of_prompts = records
    pairs = {i: of_prompts[2 * i : 2 * i + 2] for i in range(12)}
    doubled = pairs | {12 + i: [record] for i, record in enumerate(of_prompts)}
    X = [np.mean([r.representation for r in pair], axis=0) for pair in pairs.values()]
    X = np.array([*X, *(record.representation for record in of_prompts)], dtype=float)
    summary = summarize(doubled, (2,))["measures"]
    assert summary["rankme"]["mean"] == pytest.approx(naive_rank(X), rel=1e-4)


def test_of_a_group_they_are_means_over_its_tasks():
    parts = [{"mean": 1.0, "stderr": 0.3, "n": 30}, {"mean": 2.0, "stderr": 0.4, "n": 50}]
    assert mean_over_tasks(parts) == {"mean": 1.5, "stderr": 0.25, "n": 80}
    undefined = mean_over_tasks([*parts, {"mean": None, "stderr": None, "n": 5}])
    assert math.isnan(undefined["mean"]) and undefined["n"] == 85
