"""Correlations against published examples and naive computations, and in simulations whose truth is
known.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulations import covers, draws, near, normal_pair, simulate, uniform

from lm_eval_coupling.statistics import (
    compare_correlations,
    correlation,
    correlation_within,
    in_words,
    partial_correlation,
)
from lm_eval_coupling.statistics.strengths import difference_of_correlations

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


@pytest.mark.parametrize(
    "method, oracle",
    [("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("kendall", stats.kendalltau)],
)
def test_coefficients_with_ties_against_scipy(method, oracle):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 4, 40)
    found = correlation(x, y, method=method, resamples=199)
    assert found.coefficient == pytest.approx(oracle(x, y).statistic, abs=1e-12)
    assert found.low < found.coefficient < found.high and found.n == 40 and found.reason is None


def test_the_interval_is_the_jackknifes_or_fishers_where_that_is_wider():
    x, y = normal_pair(np.random.default_rng(1), 17, 0.5)
    found = correlation(x, y, resamples=99)
    fisher = stats.pearsonr(x, y).confidence_interval(0.95)
    z = np.arctanh(found.coefficient)
    without = [
        np.arctanh(np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1]) for i in range(len(x))
    ]
    error = math.sqrt(16 / 17 * np.sum((without - z) ** 2))
    half = stats.t.ppf(0.975, 16) * error
    expected = min(fisher.low, np.tanh(z - half)), max(fisher.high, np.tanh(z + half))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["pearson", "spearman", "kendall"])
def test_permutation_p_is_exact_for_few_pairs(method):
    x, y = np.array([1.0, 2, 3, 4, 6]), np.array([1.0, 2, 4, 3, 5])
    observed = correlation(x, y, method=method)
    all_of_them = [
        correlation(x, y[list(order)], method=method, resamples=1).coefficient
        for order in itertools.permutations(range(5))
    ]
    tails = np.mean(np.abs(all_of_them) >= abs(observed.coefficient) - 1e-12)
    assert observed.p == pytest.approx(tails, abs=1e-12) and observed.p < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, truth, n, slack",
    [
        ("pearson", 0.6, 12, 0.02),  # the wider of two intervals
        ("spearman", 6 / math.pi * math.asin(0.3), 20, 0.02),
        ("kendall", 2 / math.pi * math.asin(0.6), 20, 0.03),
    ],
)
def test_intervals_of_correlations_cover_and_tests_find(method, truth, n, slack):
    def one(rng):
        found = correlation(
            *normal_pair(rng, n, 0.6), method=method, resamples=399, seed=int(rng.integers(2**31))
        )
        return covers(found, truth), found.p < 0.05

    coverage, power = simulate(one, 200)
    assert near(coverage, 0.95, 200, slack)
    assert power > (0.4 if n == 12 else 0.6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, truth",
    [
        ("pearson", 0.6),
        ("spearman", 6 / math.pi * math.asin(0.3)),
        ("kendall", 2 / math.pi * math.asin(0.6)),
    ],
)
def test_large_samples_need_no_resampling(method, truth):
    def one(rng):
        found = correlation(*normal_pair(rng, 250, 0.6), method=method)
        return covers(found, truth), correlation(*normal_pair(rng, 250, 0.0), method=method).p

    covered, p = draws(one, 400)
    assert near(covered.mean(), 0.95, 400, slack=0.01) and uniform(p)


def test_large_samples_go_on_where_small_ones_end():
    x, y = normal_pair(np.random.default_rng(5), 201, 0.1)
    for method in ("pearson", "spearman", "kendall"):
        resampled, theory = (
            correlation(x[:n], y[:n], method=method, resamples=999) for n in (200, 201)
        )
        assert abs(resampled.low - theory.low) < 0.03 and abs(resampled.high - theory.high) < 0.03
        assert abs(resampled.p - theory.p) < 0.06


@pytest.mark.slow
def test_permutation_test_has_its_size():
    def one(rng):
        x, y = rng.exponential(size=10) ** 2, rng.exponential(size=10) ** 2  # far from normal
        return [
            correlation(x, y, method=m, resamples=199, seed=int(rng.integers(2**31))).p
            for m in ("pearson", "spearman")
        ]

    assert all(uniform(p) for p in draws(one, 300))


def test_incomplete_pairs_are_dropped_and_counted():
    found = correlation(
        [1, 2, math.nan, 4, 5], pd.Series([2, 1, 3, None, 7], dtype="Float64"), resamples=9
    )
    assert (found.n, found.dropped) == (3, 2)
    assert correlation([1, 2, math.inf, 4], [1, 3, 2, 5]).dropped == 1


@pytest.mark.parametrize(
    "x, y, reason",
    [
        ([1, 2], [1, 2], "2 complete"),
        ([], [], "0 complete"),
        ([3, 3, 3, 3], [1, 2, 3, 4], "x is constant"),
    ],
)
def test_undefined_correlations_say_why(x, y, reason):
    found = correlation(x, y, method="spearman")
    assert math.isnan(found.coefficient) and math.isnan(found.p) and reason in found.reason
    assert "undefined" in in_words(found) and found.reason in in_words(found)


def test_no_interval_from_few_or_perfect_ranks():
    few = correlation([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], method="kendall")
    assert math.isnan(few.low) and "5 pairs" in few.reason and few.coefficient == pytest.approx(0.8)
    perfect = correlation(range(10), range(10), method="spearman", resamples=99)
    assert (
        perfect.coefficient == pytest.approx(1)
        and math.isnan(perfect.low)
        and "the correlation is perfect" in perfect.reason
    )


def test_partial_correlations_and_those_within_groups_have_no_interval_where_plain_ones_have_none():
    """Perfect ones of families had 0.999999999999 to 1, and ranks of 5 pairs -0.46 to 0.99."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(12, 2)), columns=["x", "z"])
    frame = frame.assign(y=2 * frame["x"] + 3 * frame["z"], family=list("aaabbbcccddd"))
    perfect = partial_correlation(frame, "x", "y", ["z"], family="family", resamples=99)
    plain = correlation(frame["x"], 2 * frame["x"], family=frame["family"], resamples=99)
    assert perfect.coefficient == pytest.approx(1) and perfect.p == plain.p
    assert perfect.reason == plain.reason == "no interval, as the correlation is perfect"
    pair = pd.DataFrame({"x": [1.0, 2, 3, 4, 5], "y": [2.0, 1, 4, 3, 5], "g": "a"})
    few = correlation_within(pair, "x", "y", "g", method="spearman", resamples=99)
    plain = correlation(pair["x"], pair["y"], method="spearman", resamples=99)
    assert few.reason == plain.reason == "no interval from 5 pairs, a rank correlation needs 8"
    assert all(math.isnan(bound) for r in (perfect, few) for bound in (r.low, r.high))
    assert math.isfinite(correlation_within(pair, "x", "y", "g").low)  # Pearson's


@pytest.mark.parametrize("pairs, has_interval", [(9, False), (10, True)])
def test_ranks_within_groups_need_a_pair_more_for_each_further_group(pairs, has_interval):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(pairs, 2)), columns=["x", "y"])
    frame["g"] = np.arange(pairs) % 3
    found = correlation_within(frame, "x", "y", "g", method="spearman", resamples=99)
    assert math.isfinite(found.low) == has_interval == (found.reason is None)
    if not has_interval:
        assert found.reason == "no interval from 9 pairs in 3 groups, a rank correlation needs 10"
        assert "no interval" in in_words(found) and math.isfinite(found.p)


def test_families_that_cannot_be_left_out_leave_no_interval():
    """The interval was NaN without a reason: without the family c, z fixes x."""
    frame = pd.DataFrame({"x": [1, 1, 1, 1, 2, 3.5, 2.2], "y": [1, 2, 4, 3, 5, 2, 6]})
    frame = frame.assign(z=[0, 0, 0, 0, 1, 2, 1], family=list("aabbccc"))
    found = partial_correlation(frame, "x", "y", ["z"], family="family", resamples=99)
    assert math.isfinite(found.coefficient) and math.isnan(found.low)
    assert found.reason == "no interval, as a correlation remains without 2 families only"


def test_two_families_have_no_interval_of_a_difference():
    y, a, b = np.random.default_rng(0).normal(size=(3, 10))
    found = compare_correlations(y, a, b, family=list("aaaaabbbbb"), resamples=99)
    assert math.isfinite(found.difference) and math.isfinite(found.p) and math.isnan(found.low)
    assert found.reason == correlation(y, a, family=list("aaaaabbbbb"), resamples=99).reason
    words = in_words(found)
    assert "no interval" in words and "2 families are too few to conclude anything" in words


def test_partial_correlation_of_ppcor():
    """R's ppcor (Kim 2015): pcor.test(hl, disp, (deg, BC)) = −0.6720863, p = 0.06789202."""
    frame = pd.DataFrame(
        {
            "hl": [7, 15, 19, 15, 21, 22, 57, 15, 20, 18],
            "disp": [0, 0.964, 0, 0, 0.921, 0, 0, 1.006, 0, 1.011],
            "deg": [9, 2, 3, 4, 1, 3, 1, 3, 6, 1],
            "BC": [1.78e-02, 1.05e-06, 1.37e-05, 7.18e-03, 0, 0, 0, 4.48e-03, 2.10e-06, 0],
        }
    )
    found = partial_correlation(frame, "hl", "disp", ["deg", "BC"])
    assert found.coefficient == pytest.approx(-0.6720863, abs=5e-8) and found.given == 2
    assert found.p == pytest.approx(0.06789202, abs=0.05)  # by permutation; theirs is a t test


@pytest.mark.slow
def test_partial_correlation_covers():
    def one(rng):
        z = rng.normal(size=15)
        x, y = (v + 2 * z for v in normal_pair(rng, 15, 0.5))
        frame = pd.DataFrame({"x": x, "y": y, "z": z})
        return covers(partial_correlation(frame, "x", "y", ["z"], resamples=1), 0.5)

    assert near(simulate(one, 400), 0.95, 400, slack=0.02)  # the wider of two intervals


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, truth", [("pearson", -0.5), ("spearman", 6 / math.pi * math.asin(-0.25))]
)
def test_within_groups_the_sign_may_turn(method, truth):
    """Simpson's paradox: groups of higher x have higher y, within groups it is the other way."""

    def one(rng):
        group = np.repeat(np.arange(5), 20)
        x, y = normal_pair(rng, 100, -0.5)
        frame = pd.DataFrame({"x": x + 3 * group, "y": y + 3 * group, "group": group})
        pooled = stats.pearsonr(frame["x"], frame["y"]).statistic
        found = correlation_within(frame, "x", "y", "group", method=method, resamples=399)
        assert found.given == 4 and found.n == 100
        return covers(found, truth), found.p < 0.05, pooled > 0.5

    coverage, power, pooled = simulate(one, 150)
    assert near(coverage, 0.95, 150, slack=0.02)  # the wider of two intervals
    assert power > 0.95 and pooled == 1


def test_ranks_within_groups_against_a_loop():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "x": rng.integers(0, 5, 30),
            "y": rng.normal(size=30),
            "g": np.repeat([0, 1, 2], [4, 9, 17]),
        }
    )
    parts = []
    for _, rows in frame.groupby("g"):
        ranks = stats.rankdata(rows[["x", "y"]], axis=0)
        parts.append((ranks - ranks.mean(axis=0)) / (len(rows) - 1))
    found = correlation_within(frame, "x", "y", "g", method="spearman")
    assert found.coefficient == pytest.approx(np.corrcoef(np.concatenate(parts).T)[0, 1], abs=1e-12)
    half = 1.959964 * math.sqrt(
        (1 + found.coefficient**2 / 2) / (30 - 3 - 2)
    )  # Bonett and Wright (2000), 2 more fixed
    z = np.arctanh(found.coefficient)
    assert found.low <= np.tanh(z - half) + 1e-6 and found.high >= np.tanh(z + half) - 1e-6


def test_groups_of_one_say_nothing():
    frame = pd.DataFrame(
        {"x": [1.0, 2, 3, 1, 2, 4, 9], "y": [1.0, 2, 4, 2, 1, 5, 9], "g": list("aaabbbc")}
    )
    found = correlation_within(frame, "x", "y", "g")
    assert (found.n, found.dropped, found.given) == (6, 1, 1)
    assert found.coefficient == pytest.approx(
        partial_correlation(frame[:6].assign(b=[0, 0, 0, 1, 1, 1]), "x", "y", ["b"]).coefficient
    )


@pytest.mark.parametrize(
    "first, second, between, n, t, p",
    [
        (0.3, 0.4, 0.5, 100, -1.0767, 0.2843),  # Silver, Hittner and May (2006), DEPCOR
    ],
)
def test_williams_t_as_published(first, second, between, n, t, p):
    found = difference_of_correlations(first, second, between, n)
    assert (round(found.t, 4), round(found.p, 4)) == (t, p)


def test_zous_interval_as_published():
    """Zou (2007), dependent correlations that share a variable: 0.396, 0.179, 0.088, n = 66."""
    found = difference_of_correlations(0.396, 0.179, 0.088, 66)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.093, 0.517)


@pytest.mark.slow
def test_compared_strengths_have_their_size_coverage_and_power():
    """The second predictor is turned around, which must not matter."""

    def one(rng):
        y = rng.normal(size=30)
        shared = rng.normal(size=30)
        a, b, c = (k * y + shared + rng.normal(size=30) for k in (0.8, 0.8, 0.0))
        same = compare_correlations(y, a, -b, resamples=399)
        other = compare_correlations(y, -a, c, resamples=399)
        return same.p, covers(same, 0), covers(other, 0.8 / math.sqrt(2.64)), other.p < 0.05

    p, *rates = draws(one, 300)
    coverage, of_difference, power = np.mean(rates, axis=1)
    assert (
        uniform(p)
        and near(coverage, 0.95, 300)
        # |r| of a predictor that says nothing is above 0.
        and near(of_difference, 0.95, 300, slack=0.03)
        and power > 0.25
    )
