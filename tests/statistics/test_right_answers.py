"""AUROC and odds within a model against published examples, and in simulations whose truth is
known.
"""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulations import covers, draws, near, simulate, uniform

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    accuracy_by_bin,
    auroc,
    auroc_within,
    logistic_effect,
)

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


def test_auroc_of_iris_as_published():
    """R's pROC on iris, sepal length of setosa against the others: 0.9586, 95% interval (DeLong)
    0.9302 to 0.9870.
    """
    iris = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the data").load_iris()
    found = auroc(iris.data[:, 0], iris.target != 0)
    assert found.auroc == pytest.approx(0.9586, abs=1e-10)
    assert (
        found.auroc - 1.959964 * found.stderr,
        found.auroc + 1.959964 * found.stderr,
    ) == pytest.approx((0.93020851, 0.98699149), abs=1e-7)
    assert (found.right, found.wrong) == (
        100,
        50,
    ) and 0.91 < found.low < found.auroc < found.high < 0.987


def test_auroc_with_ties_against_all_pairs():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(1, 6, 13), rng.integers(0, 5, 9)
    beats = np.array([[float(r > w) + 0.5 * (r == w) for w in wrong] for r in right])
    variance = beats.mean(axis=1).var(ddof=1) / 13 + beats.mean(axis=0).var(ddof=1) / 9
    found = auroc(np.r_[right, wrong], np.repeat([1, 0], [13, 9]))
    assert (found.auroc, found.stderr) == pytest.approx(
        (beats.mean(), math.sqrt(variance)), rel=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_aurocs_cover(shift):
    truth = stats.norm.cdf(shift / math.sqrt(2))

    def one(rng):
        found = auroc(
            np.r_[rng.normal(size=25) + shift, rng.normal(size=15)], np.repeat([1, 0], [25, 15])
        )
        return covers(found, truth), found.p

    covered, p = draws(one, 500)
    assert near(covered.mean(), 0.95, 500, slack=0.015)  # asymptotic
    assert uniform(p) if shift == 0 else np.mean(p < 0.05) > 0.75


def test_pooled_aurocs_of_tasks_against_their_formula():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "value": rng.normal(size=60),
            "right": rng.permutation(60) % 2,
            "task": np.arange(60) // 20,
        }
    )
    frame.loc[:9, "right"] = 1
    by_task, pooled = auroc_within(frame, "value", "right", "task")
    pairs = np.array([f.right * f.wrong for f in by_task.values()])
    stderrs = np.array([f.stderr for f in by_task.values()])
    assert pooled.auroc == pytest.approx(pairs @ [f.auroc for f in by_task.values()] / pairs.sum())
    assert (
        pooled.stderr == pytest.approx(math.sqrt(pairs**2 @ stderrs**2) / pairs.sum())
        and pooled.tasks == 3
    )
    one = auroc_within(frame.assign(task="all"), "value", "right", "task")[1]
    right, wrong = frame["value"][frame["right"] == 1], frame["value"][frame["right"] == 0]
    expected = stats.mannwhitneyu(right, wrong, method="asymptotic", use_continuity=False).pvalue
    assert one.p == pytest.approx(expected, abs=0.05)
    assert (one.p < 0.05) == (not one.low <= 0.5 <= one.high)  # test and interval are of one kind


def test_aurocs_without_an_interval_say_why():
    assert "2 of each" in auroc([1, 2, 3], [1, 1, 0]).reason
    perfect = auroc([1, 2, 3, 4], [0, 0, 1, 1])
    assert (
        perfect.auroc == 1 and math.isnan(perfect.low) and "separated perfectly" in perfect.reason
    )
    assert "same value" in auroc([1, 1, 1, 1], [0, 0, 1, 1]).reason
    with pytest.raises(CouplingError, match="0.5 as correct"):
        auroc([1, 2, 3], [1, 0.5, 0])


def test_one_cluster_has_no_error():
    frame = documents(np.random.default_rng(0)).assign(cluster="all")
    found = logistic_effect(frame, correct="correct", predictor="own", cluster="cluster")
    assert found.reason == "all answers are of one cluster, at least 2 are needed"


def documents(rng, n=150, effect=0.0):
    """Six tasks: the easier, the higher the coupling of its documents."""
    task = rng.integers(0, 6, n)
    own = rng.normal(size=n)
    correct = rng.random(n) < 1 / (1 + np.exp(-(task - 2.5 + effect * own)))
    return pd.DataFrame(
        {
            "coupling": own + task,
            "own": own,
            "correct": correct,
            "length": rng.normal(size=n),
            "task": [f"t{i}" for i in task],
        }
    )


@pytest.mark.slow
def test_easy_tasks_of_high_coupling_fool_only_what_ignores_the_task():
    def one(rng):
        frame = documents(rng)
        of = {"correct": "correct", "predictor": "coupling", "controls": ["length"]}
        by_task, pooled = auroc_within(frame, "coupling", "correct", "task")
        assert len(by_task) == 6 and pooled.right + pooled.wrong + pooled.dropped == 150
        return (
            logistic_effect(frame, **of, task="task").p,
            pooled.p,
            covers(pooled, 0.5),
            logistic_effect(frame, **of).p < 0.05,
            auroc(frame["coupling"], frame["correct"]).p < 0.05,
        )

    logistic, within, *rates = draws(one, 60)
    coverage, naive_logistic, naive_auroc = np.mean(rates, axis=1)
    assert uniform(logistic) and uniform(within) and near(coverage, 0.95, 60, slack=0.02)
    assert naive_logistic > 0.95 and naive_auroc > 0.95


@pytest.mark.slow
def test_odds_ratios_cover():
    def one(rng):
        frame = documents(rng, n=400, effect=0.8)
        found = logistic_effect(
            frame, correct="correct", predictor="own", controls=["length"], task="task"
        )
        truth = 0.8 * frame["own"].std()
        assert found.tasks >= 5 and found.odds_ratio == pytest.approx(
            math.exp(found.log_odds.value)
        )
        return covers(found.log_odds, truth), found.p < 0.05

    coverage, power = simulate(one, 100)
    assert near(coverage, 0.95, 100, slack=0.01) and power > 0.95


def test_logistic_effect_as_published():
    """Spector and Mazzeo's data in Greene's Econometric Analysis: PSI 2.379 (1.065), log likelihood
    −12.890.
    """
    data = sm.datasets.spector.load_pandas()
    frame = data.exog.assign(GRADE=data.endog)
    found = logistic_effect(frame, correct="GRADE", predictor="PSI", controls=["GPA", "TUCE"])
    unit = frame["PSI"].std()
    assert (round(found.log_odds.value / unit, 3), round(found.log_odds.stderr / unit, 3)) == (
        2.379,
        1.065,
    )
    without = sm.Logit(frame["GRADE"], sm.add_constant(frame[["GPA", "TUCE"]])).fit(disp=False).llf
    assert found.p == pytest.approx(stats.chi2.sf(2 * (-12.889634 - without), 1), rel=1e-4)
    assert any("10 answers of the rarer kind" in note for note in found.notes)


@pytest.mark.parametrize(
    "value, separated",
    [([1, 2, 3, 4, 5, 6], True), ([1, 2, 3, 3, 4, 5], True), ([1, 2, 4, 3, 5, 6], False)],
)
def test_perfect_separation_is_said(value, separated):
    """Completely; in all but a tie (where the likelihood has no maximum either); not at all."""
    frame = pd.DataFrame({"coupling": value, "correct": [0, 0, 0, 1, 1, 1]})
    found = logistic_effect(frame, correct="correct", predictor="coupling")
    assert (found.reason is not None and "perfectly" in found.reason) == separated
    assert math.isnan(found.odds_ratio) == separated


def test_tasks_answered_all_right_say_nothing():
    frame = documents(np.random.default_rng(0))
    easy = pd.DataFrame({"coupling": range(10), "correct": True, "length": 0.0, "task": "easy"})
    of = {"correct": "correct", "predictor": "coupling", "task": "task"}
    found, expected = logistic_effect(pd.concat([frame, easy]), **of), logistic_effect(frame, **of)
    assert (
        found.dropped == 10
        and found.tasks == 6
        and found.odds_ratio == pytest.approx(expected.odds_ratio)
    )
    by_task, pooled = auroc_within(pd.concat([frame, easy]), "coupling", "correct", "task")
    before = auroc_within(frame, "coupling", "correct", "task")[1]
    assert (
        by_task["easy"].reason
        and pooled.dropped == before.dropped + 10
        and pooled.auroc == before.auroc
    )
    pairs = {name: f.right * f.wrong for name, f in by_task.items() if f.reason is None}
    assert pooled.auroc == pytest.approx(
        sum(by_task[k].auroc * v for k, v in pairs.items()) / sum(pairs.values())
    )


def test_accuracy_by_bin():
    rng = np.random.default_rng(0)
    value = rng.uniform(size=2000)
    table = accuracy_by_bin(value, rng.random(2000) < value, bins=5)
    assert table["n"].tolist() == [400] * 5
    assert (
        (table["low"] <= table["mean"]) & (table["mean"] <= table["high"])
    ).sum() >= 4  # calibrated by construction
    assert (table["bin_high"][:-1].to_numpy() == table["bin_low"][1:].to_numpy()).all()
    assert accuracy_by_bin([1, 1, 1, 2], [0, 1, 1, 1], bins=10)["n"].sum() == 4
    assert accuracy_by_bin([], []).empty


def test_wilsons_interval_as_published():
    """Newcombe (1998): 81 of 263 has the 95% interval 0.2553 to 0.3662."""
    table = accuracy_by_bin(np.ones(263), np.arange(263) < 81)
    assert (round(table["low"][0], 4), round(table["high"][0], 4)) == (0.2553, 0.3662)
