"""Statistics against published worked examples, against naive computations, and in simulations whose truth is known.

Simulations are seeded. A rate over N of them may differ from the truth by four Monte-Carlo standard errors; where a method
is approximate in samples of this size, the slack that is granted beyond that is written beside it.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    Correlation,
    accuracy_by_bin,
    adjust_p_values,
    as_frame,
    auroc,
    auroc_within,
    collinearity,
    compare_correlations,
    correlation,
    correlation_within,
    exponential_fit,
    family_effect,
    in_words,
    line_fit,
    logistic_effect,
    nested_models,
    partial_correlation,
    proportion_error,
)
from lm_eval_coupling.statistics.correlations import difference_of_correlations
from lm_eval_coupling.statistics.curves import _growth, _growth_gradient

sm = pytest.importorskip("statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed")


def draws(one, n):
    """Each number that ``one`` returns, over n seeded simulations."""
    return np.array([one(np.random.default_rng([20240717, i])) for i in range(n)], dtype=float).T


def simulate(one, n):
    """Their means."""
    return draws(one, n).mean(axis=-1)


def uniform(p):
    """Whether p-values are spread as they must be where there is nothing to find; sees tests that never reject, too."""
    return stats.kstest(p, "uniform").pvalue > 1e-3


def near(rate, expected, n, slack=0.0):
    return abs(rate - expected) <= 4 * math.sqrt(expected * (1 - expected) / n) + slack


def normal_pair(rng, n, rho):
    x = rng.normal(size=n)
    return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)


def covers(found, truth):
    return found.low <= truth <= found.high


# Correlations


@pytest.mark.parametrize(
    "method, oracle", [("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("kendall", stats.kendalltau)]
)
def test_coefficients_with_ties_against_scipy(method, oracle):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 4, 40)
    found = correlation(x, y, method=method, resamples=199)
    assert found.coefficient == pytest.approx(oracle(x, y).statistic, abs=1e-12)
    assert found.low < found.coefficient < found.high and found.n == 40 and found.reason is None


def test_fishers_interval_against_scipy():
    x, y = normal_pair(np.random.default_rng(1), 17, 0.5)
    found = correlation(x, y, confidence=0.9, resamples=99)
    expected = stats.pearsonr(x, y).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("method", ["pearson", "spearman", "kendall"])
def test_permutation_p_is_exact_for_few_pairs(method):
    x, y = np.array([1.0, 2, 3, 4, 6]), np.array([1.0, 2, 4, 3, 5])
    observed = correlation(x, y, method=method)
    all_of_them = [
        correlation(x, y[list(order)], method=method, resamples=1).coefficient for order in itertools.permutations(range(5))
    ]
    tail = np.mean(np.array(all_of_them) >= observed.coefficient - 1e-12)
    assert observed.p == pytest.approx(min(1, 2 * min(tail, 1)), abs=1e-12) and observed.p < 0.2


@pytest.mark.parametrize(
    "method, truth, n, slack",
    [
        ("pearson", 0.6, 12, 0.0),
        ("spearman", 6 / math.pi * math.asin(0.3), 20, 0.02),  # bootstrap of ranks
        ("kendall", 2 / math.pi * math.asin(0.6), 20, 0.03),
    ],
)
def test_intervals_of_correlations_cover_and_tests_find(method, truth, n, slack):
    def one(rng):
        found = correlation(*normal_pair(rng, n, 0.6), method=method, resamples=399, seed=int(rng.integers(2**31)))
        return covers(found, truth), found.p < 0.05

    coverage, power = simulate(one, 200)
    assert near(coverage, 0.95, 200, slack)
    assert power > (0.4 if n == 12 else 0.6)


@pytest.mark.parametrize(
    "method, truth",
    [("pearson", 0.6), ("spearman", 6 / math.pi * math.asin(0.3)), ("kendall", 2 / math.pi * math.asin(0.6))],
)
def test_large_samples_need_no_resampling(method, truth):
    def one(rng):
        found = correlation(*normal_pair(rng, 250, 0.6), method=method)
        return covers(found, truth), correlation(*normal_pair(rng, 250, 0.0), method=method).p

    covered, p = draws(one, 400)
    assert near(covered.mean(), 0.95, 400) and uniform(p)


def test_large_samples_go_on_where_small_ones_end():
    x, y = normal_pair(np.random.default_rng(5), 201, 0.1)
    for method in ("pearson", "spearman", "kendall"):
        resampled, theory = (correlation(x[:n], y[:n], method=method, resamples=999) for n in (200, 201))
        assert abs(resampled.low - theory.low) < 0.03 and abs(resampled.high - theory.high) < 0.03
        assert abs(resampled.p - theory.p) < 0.06


def test_permutation_test_has_its_size():
    def one(rng):
        x, y = rng.exponential(size=10) ** 2, rng.exponential(size=10) ** 2  # far from normal
        return [correlation(x, y, method=m, resamples=199, seed=int(rng.integers(2**31))).p for m in ("pearson", "spearman")]

    assert all(uniform(p) for p in draws(one, 300))


def test_incomplete_pairs_are_dropped_and_counted():
    found = correlation([1, 2, math.nan, 4, 5], pd.Series([2, 1, 3, None, 7], dtype="Float64"), resamples=9)
    assert (found.n, found.dropped) == (3, 2)
    assert correlation([1, 2, math.inf, 4], [1, 3, 2, 5]).dropped == 1


@pytest.mark.parametrize(
    "x, y, reason",
    [([1, 2], [1, 2], "2 complete"), ([], [], "0 complete"), ([3, 3, 3, 3], [1, 2, 3, 4], "x is constant")],
)
def test_undefined_correlations_say_why(x, y, reason):
    found = correlation(x, y, method="spearman")
    assert math.isnan(found.coefficient) and math.isnan(found.p) and reason in found.reason
    assert "undefined" in in_words(found) and found.reason in in_words(found)


def test_no_interval_from_few_or_perfect_ranks():
    few = correlation([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], method="kendall")
    assert math.isnan(few.low) and "5 pairs" in few.reason and few.coefficient == pytest.approx(0.8)
    perfect = correlation(range(10), range(10), method="spearman", resamples=99)
    assert perfect.coefficient == pytest.approx(1) and math.isnan(perfect.low) and "all resamples agree" in perfect.reason


def test_partial_correlation_of_ppcor():
    """Example of R's ppcor (Kim 2015): pcor.test(hl, disp, (deg, BC)) = −0.6720863, p = 0.06789202."""
    frame = pd.DataFrame(
        {
            "hl": [7, 15, 19, 15, 21, 22, 57, 15, 20, 18],
            "disp": [0, 0.964, 0, 0, 0.921, 0, 0, 1.006, 0, 1.011],
            "deg": [9, 2, 3, 4, 1, 3, 1, 3, 6, 1],
            "BC": [1.78e-02, 1.05e-06, 1.37e-05, 7.18e-03, 0, 0, 0, 4.48e-03, 2.10e-06, 0],
        }
    )
    found = partial_correlation(frame, "hl", "disp", ["deg", "BC"])
    assert (found.coefficient, found.p) == pytest.approx((-0.6720863, 0.06789202), abs=5e-8) and found.given == 2


def test_partial_correlation_covers():
    def one(rng):
        z = rng.normal(size=15)
        x, y = (v + 2 * z for v in normal_pair(rng, 15, 0.5))
        return covers(partial_correlation(pd.DataFrame({"x": x, "y": y, "z": z}), "x", "y", ["z"]), 0.5)

    assert near(simulate(one, 400), 0.95, 400)


@pytest.mark.parametrize("method, truth", [("pearson", -0.5), ("spearman", 6 / math.pi * math.asin(-0.25))])
def test_within_groups_the_sign_may_turn(method, truth):
    """Simpson's paradox: groups of higher x have higher y, within groups it is the other way."""

    def one(rng):
        group = np.repeat(np.arange(5), 20)
        x, y = normal_pair(rng, 100, -0.5)
        frame = pd.DataFrame({"x": x + 3 * group, "y": y + 3 * group, "group": group})
        pooled = stats.pearsonr(frame["x"], frame["y"]).statistic
        found = correlation_within(frame, "x", "y", "group", method=method)
        assert found.given == 4 and found.n == 100
        return covers(found, truth), found.p < 0.05, pooled > 0.5

    coverage, power, pooled = simulate(one, 150)
    assert near(coverage, 0.95, 150, slack=0.02 if method == "spearman" else 0)  # ranks of 20 are coarser than of many
    assert power > 0.95 and pooled == 1


def test_ranks_within_groups_against_a_loop():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.integers(0, 5, 30), "y": rng.normal(size=30), "g": np.repeat([0, 1, 2], [4, 9, 17])})
    parts = []
    for _, rows in frame.groupby("g"):
        ranks = stats.rankdata(rows[["x", "y"]], axis=0)
        parts.append((ranks - ranks.mean(axis=0)) / (len(rows) - 1))
    found = correlation_within(frame, "x", "y", "g", method="spearman")
    assert found.coefficient == pytest.approx(np.corrcoef(np.concatenate(parts).T)[0, 1], abs=1e-12)
    half = 1.959964 * math.sqrt((1 + found.coefficient**2 / 2) / (30 - 3 - 2))  # Bonett and Wright (2000), 2 more fixed
    expected = np.tanh([np.arctanh(found.coefficient) - half, np.arctanh(found.coefficient) + half])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-6)


def test_groups_of_one_say_nothing():
    frame = pd.DataFrame({"x": [1.0, 2, 3, 1, 2, 4, 9], "y": [1.0, 2, 4, 2, 1, 5, 9], "g": list("aaabbbc")})
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


def test_compared_correlations_have_their_size_coverage_and_power():
    def one(rng):
        y = rng.normal(size=30)
        shared = rng.normal(size=30)
        a, b, c = (k * y + shared + rng.normal(size=30) for k in (0.8, 0.8, 0.0))
        same, other = compare_correlations(y, a, b), compare_correlations(y, a, c)
        return same.p, covers(same, 0), covers(other, 0.8 / math.sqrt(2.64)), other.p < 0.05

    p, *rates = draws(one, 500)
    coverage, of_difference, power = np.mean(rates, axis=1)
    assert uniform(p) and near(coverage, 0.95, 500) and near(of_difference, 0.95, 500) and power > 0.5


# Curves

ANSCOMBE = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5], [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
PEARSON_YORK = {
    "x": [0, 0.9, 1.8, 2.6, 3.3, 4.4, 5.2, 6.1, 6.5, 7.4],
    "y": [5.9, 5.4, 4.4, 4.6, 3.5, 3.7, 2.8, 2.8, 2.4, 1.5],
    "x_error": np.array([1000, 1000, 500, 800, 200, 80, 60, 20, 1.8, 1]) ** -0.5,
    "y_error": np.array([1, 1.8, 4, 8, 20, 20, 70, 70, 100, 500]) ** -0.5,
}


def test_line_of_anscombes_first_set():
    """Anscombe (1973): y = 3.00 + 0.500 x, standard error of the slope 0.118, R² 0.667."""
    found = line_fit(*ANSCOMBE)
    slope = found.coefficients["slope"]
    assert round(found.coefficients["intercept"].value, 2) == 3.00
    assert (round(slope.value, 3), round(slope.stderr, 3), round(found.r2, 3)) == (0.500, 0.118, 0.667)
    expected = stats.linregress(*ANSCOMBE)
    assert found.p == pytest.approx(expected.pvalue)
    assert slope.high - slope.value == pytest.approx(stats.t.ppf(0.975, 9) * expected.stderr)


def test_errors_in_both_as_published():
    """Pearson's data with York's weights: York et al. (2004); digits from the R package bfsl, standard errors times √χ²ᵣ."""
    found = line_fit(**PEARSON_YORK)
    intercept, slope = found.coefficients["intercept"], found.coefficients["slope"]
    assert (intercept.value, slope.value) == pytest.approx((5.479910224, -0.480533407), abs=1e-9)
    assert found.dispersion**2 == pytest.approx(1.483294149, abs=1e-9)
    assert intercept.stderr / found.dispersion == pytest.approx(0.294970735, abs=1e-9)
    assert slope.stderr / found.dispersion == pytest.approx(0.0579850090, abs=1e-9)
    # There −0.01651, from the mean of the observed x; that of the adjusted x, which York's errors use, is 0.2% smaller.
    assert found.covariance[0, 1] / found.dispersion**2 == pytest.approx(-0.01651, rel=3e-3)


def test_errors_in_both_of_one_size_are_demings():
    x, y = np.array(PEARSON_YORK["x"]), np.array(PEARSON_YORK["y"])
    sxx, syy, sxy = np.var(x), np.var(y), np.cov(x, y, bias=True)[0, 1]
    ratio = 49 / 9
    deming = (syy - ratio * sxx + math.sqrt((syy - ratio * sxx) ** 2 + 4 * ratio * sxy**2)) / (2 * sxy)
    found = line_fit(x, y, x_error=np.full(10, 3.0), y_error=np.full(10, 7.0))
    assert found.coefficients["slope"].value == pytest.approx(deming, rel=1e-10)
    assert found.dispersion < 1  # errors explain more than the scatter: larger ones still widen the interval
    larger = line_fit(x, y, x_error=np.full(10, 6.0), y_error=np.full(10, 14.0)).coefficients["slope"]
    assert larger.stderr == pytest.approx(2 * found.coefficients["slope"].stderr)


def test_lines_cover_and_weights_help():
    def one(rng):
        x, errors = rng.normal(size=15), np.exp(rng.normal(size=15))
        y = 1 + 2 * x + errors * rng.normal(size=15)
        plain, weighted = line_fit(x, y), line_fit(x, y, y_error=errors)
        low, high = weighted.band([0.5])
        slopes = plain.coefficients["slope"], weighted.coefficients["slope"]
        return covers(slopes[1], 2), low[0] <= 2 <= high[0], *(slope.stderr for slope in slopes), weighted.dispersion

    coverage, of_band, plain, weighted, dispersion = simulate(one, 400)
    assert near(coverage, 0.95, 400) and near(of_band, 0.95, 400)
    assert weighted < plain / 2 and dispersion == pytest.approx(1, abs=0.05)


def test_errors_of_x_flatten_a_plain_line_but_not_yorks():
    def one(rng):
        truth, x_error, y_error = rng.normal(size=25), rng.uniform(0.2, 0.6, 25), rng.uniform(0.2, 0.6, 25)
        x, y = truth + x_error * rng.normal(size=25), 1 + 2 * truth + y_error * rng.normal(size=25)
        found = line_fit(x, y, x_error=x_error, y_error=y_error)
        slope = found.coefficients["slope"]
        low, high = found.band([1.0])
        flat = line_fit(x, y).coefficients["slope"]
        return slope.value, covers(slope, 2), covers(found.coefficients["intercept"], 1), low[0] <= 3 <= high[0], flat.value

    slope, coverage, of_intercept, of_band, flat = simulate(one, 300)
    assert slope == pytest.approx(2, abs=0.05) and flat < 1.8
    # Never narrowed where the errors explain more than the scatter: on the wide side.
    assert all(near(rate, 0.95, 300, slack=0.02) for rate in (coverage, of_intercept, of_band))


def test_exponential_as_published():
    """R's documented SSasymp fit of Loblolly, seed 329: Asym 94.1282 (8.4030), R0 −8.2508, lrc −3.2176 (0.1386)."""
    age, height = [3, 5, 10, 15, 20, 25], [3.93, 9.34, 26.08, 37.79, 48.31, 56.43]
    found = exponential_fit(age, height)
    a, b, c = (found.coefficients[name] for name in "abc")
    assert (round(a.value, 4), round(a.stderr, 4)) == (94.1282, 8.4030)
    assert round(a.value + b.value, 4) == round(found.predict([0])[0], 4) == -8.2508
    assert (round(math.log(-c.value), 4), round(-c.stderr / c.value, 4)) == (-3.2176, 0.1386)
    assert math.sqrt(np.sum((found.predict(age) - height) ** 2) / 3) == pytest.approx(0.7493, abs=5e-5)
    low, high = found.band([0])
    assert (high[0] - low[0]) / 2 / stats.t.ppf(0.975, 3) == pytest.approx(1.2261, abs=5e-5)


def test_exponential_covers_and_tells_itself_from_a_line():
    def one(rng):
        x = rng.uniform(0.2, 0.6, 25)
        noise, seed = 0.02 * rng.normal(size=25), int(rng.integers(2**31))
        curved = exponential_fit(x, 0.3 + 0.02 * np.exp(5 * x) + noise, resamples=19, seed=seed)
        straight = exponential_fit(x, x + noise, resamples=19, seed=seed)
        low, high = curved.band([0.4])
        return (
            covers(curved.coefficients["c"], 5),
            low[0] <= 0.3 + 0.02 * math.exp(2) <= high[0],
            straight.p_curvature,
        )

    *rates, p_curvature = draws(one, 150)
    assert all(near(rate, 0.95, 150, slack=0.02) for rate in np.mean(rates, axis=1))  # linearised
    assert uniform(p_curvature)


def test_exponential_permutation_test_has_its_size_despite_the_search_and_weights():
    def one(rng):
        x, errors = rng.uniform(size=12), np.exp(rng.normal(size=12))
        y, seed = errors * rng.normal(size=12), int(rng.integers(2**31))
        return exponential_fit(x, y, y_error=errors, resamples=99, seed=seed).p

    assert uniform(draws(one, 200))


def test_exponential_with_weights_against_a_direct_fit():
    """In a, b and c themselves, where the optimiser settles only because it starts at the answer; and F from two fits."""
    rng = np.random.default_rng(4)
    x, errors = rng.uniform(2, 3, 20), np.exp(rng.normal(size=20)) / 3
    y = np.exp(1.5 * (x - 2)) + errors * rng.normal(size=20)
    found, line = exponential_fit(x, y, y_error=errors), line_fit(x, y, y_error=errors)
    values = [found.coefficients[name].value for name in "abc"]
    direct, covariance = optimize.curve_fit(lambda x, a, b, c: a + b * np.exp(c * x), x, y, p0=values, sigma=errors)
    assert values == pytest.approx(direct, rel=1e-4)
    assert [found.coefficients[name].stderr for name in "abc"] == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-3)
    squares = [fit.dispersion**2 * (20 - k) for fit, k in ((line, 2), (found, 3))]
    f = (squares[0] - squares[1]) / (squares[1] / 17)
    assert found.p_curvature == pytest.approx(stats.f.sf(f, 1, 17), rel=1e-8) and f > 1


def test_exponential_is_the_same_in_other_units():
    rng = np.random.default_rng(3)
    x = rng.uniform(size=20)
    y = np.exp(2 * x) + 0.1 * rng.normal(size=20)
    errors = rng.uniform(0.05, 0.2, 20)
    here, there = exponential_fit(x, y, y_error=errors), exponential_fit(1000 * x, y / 100, y_error=errors / 100)
    assert there.coefficients["c"].value == pytest.approx(here.coefficients["c"].value / 1000, rel=1e-5)
    assert there.coefficients["b"].stderr == pytest.approx(here.coefficients["b"].stderr / 100, rel=1e-4)
    assert (there.r2, there.p, there.dispersion) == pytest.approx((here.r2, here.p, here.dispersion), rel=1e-6)


def test_exponential_is_the_same_mirrored():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=20)
    y = np.exp(4 * x) + 20 * rng.normal(size=20)
    here, there = exponential_fit(x, y), exponential_fit(-x, y)
    assert there.coefficients["c"].value == pytest.approx(-here.coefficients["c"].value, rel=1e-4)
    assert here.p == there.p and 0.005 < here.p < 0.5


@pytest.mark.parametrize("k", [0.0, 5e-4, 2e-3, -3.0, 8.0])
def test_gradient_of_the_exponential_against_differences(k):
    z, at, step = np.linspace(-1, 1, 7), np.array([0.3, -2.0, k]), 1e-5
    naive = [(_growth(z, *(at + d)) - _growth(z, *(at - d))) / (2 * step) for d in step * np.eye(3)]
    assert _growth_gradient(z, *at) == pytest.approx(np.array(naive), rel=1e-5, abs=1e-5)


def test_curves_that_cannot_be_fitted_say_why():
    assert "at least 3" in line_fit([1, 2], [1, 2]).reason and np.isnan(line_fit([1, 2], [1, 2]).predict([1.0])).all()
    assert line_fit([1, 1, 1], [1, 2, 3]).reason == "x is constant"
    assert line_fit([1, 2, 3], [2, 2, 2]).reason == "y is constant"
    assert "different values" in exponential_fit([1, 1, 2, 2, 2], [1, 2, 3, 4, 5]).reason
    step = exponential_fit([1, 2, 3, 4, 5, 6], [0.01, 0, -0.01, 0.005, 0, 5], resamples=9)
    assert any("not determined" in note for note in step.notes) and math.isnan(step.coefficients["c"].stderr)


def test_errors_of_zero_are_refused_with_a_remedy():
    """A score of 0 or 1 has a standard error of 0 in lm-eval, which would give it infinite weight."""
    with pytest.raises(CouplingError, match="proportion_error"):
        line_fit([1, 2, 3], [0.2, 0.5, 1.0], y_error=[0.1, 0.1, 0.0])
    with pytest.raises(CouplingError, match="without y_error"):
        line_fit([1, 2, 3], [0.2, 0.5, 1.0], x_error=[0.1, 0.1, 0.1])
    assert (proportion_error([0.0, 1.0], 20) > 0.04).all()
    assert proportion_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


# Regressions

LONGLEY = sm.datasets.longley.load_pandas()
LONGLEY = LONGLEY.exog.assign(TOTEMP=LONGLEY.endog)
OTHERS = ["GNPDEFL", "GNP", "UNEMP", "ARMED", "POP"]


def test_longley_as_certified():
    """NIST's certified values of Longley's data: the coefficient of YEAR and R²."""
    found = nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS)
    assert (found.effect.value, found.effect.stderr) == pytest.approx((1829.15146461355, 455.478499142212), rel=1e-8)
    assert found.with_predictor.r2 == pytest.approx(0.995479004577296, rel=1e-12)
    assert found.f == pytest.approx((1829.15146461355 / 455.478499142212) ** 2, rel=1e-8)
    assert found.partial.p == pytest.approx(found.p, rel=1e-6)
    assert found.n == 16 and found.df == 9 and len(found.notes) == 2


def test_collinearity_of_longley():
    """The variance inflation factors that textbooks give for Longley's data; ratio of its eigenvalues 12220."""
    table = collinearity(LONGLEY, [*OTHERS, "YEAR"])
    assert table["vif"].round(2).tolist() == [135.53, 1788.51, 33.62, 3.59, 399.15, 758.98]
    assert table.attrs["condition_number"] ** 2 == pytest.approx(12220, rel=1e-3)
    assert table.loc["GNP", "note"] == "the other predictors explain more than 99.9% of GNP"
    assert table.loc["ARMED", "note"] == ""


def test_exact_dependence_is_said():
    frame = LONGLEY.assign(double=2 * LONGLEY["GNP"] + 1)
    table = collinearity(frame, ["GNP", "double", "POP"])
    assert np.isinf(table["vif"]).tolist() == [True, True, False] and table.attrs["condition_number"] == math.inf
    assert table.loc["double", "note"] == "the other predictors explain all of double"
    found = nested_models(frame, score="TOTEMP", predictor="double", covariates=["GNP", "POP"])
    assert found.reason == "GNP and double determine each other exactly" and math.isnan(found.p)
    assert "constant" in nested_models(frame.assign(one=1), score="TOTEMP", predictor="one").reason
    assert "at least 8" in nested_models(frame[:7], score="TOTEMP", predictor="YEAR", covariates=OTHERS).reason


def left_out(y, X, groups):
    """Each group predicted by a regression without it."""
    errors = means = 0.0
    for group in set(groups):
        own = np.array(groups) == group
        beta = np.linalg.lstsq(X[~own], y[~own], rcond=None)[0]
        errors += np.sum((y[own] - X[own] @ beta) ** 2)
        means += np.sum((y[own] - y[~own].mean()) ** 2)
    return 1 - errors / means


def family_frame(rng, families=6, each=4, share=1.0, effect=0.0, between=False):
    family = np.repeat(np.arange(families), each)
    x = rng.normal(size=families)[family] if between else rng.normal(size=len(family))
    y = effect * x + math.sqrt(share) * rng.normal(size=families)[family] + rng.normal(size=len(family))
    return pd.DataFrame({"score": y, "coupling": x, "size": rng.normal(size=len(y)), "family": [f"f{i}" for i in family]})


def test_predictions_of_what_was_left_out_against_refits():
    frame = family_frame(np.random.default_rng(0), effect=1.0).sample(frac=1, random_state=0)
    found = nested_models(frame, score="score", predictor="coupling", covariates=["size"], family="family")
    y, one = frame["score"].to_numpy(), np.ones(len(frame))
    X = np.column_stack([one, frame["size"], frame["coupling"]])
    assert found.with_predictor.r2_left_out == pytest.approx(left_out(y, X, range(len(y))), rel=1e-10)
    assert found.with_predictor.r2_left_out_family == pytest.approx(left_out(y, X, list(frame["family"])), rel=1e-10)
    assert found.without.r2_left_out_family == pytest.approx(left_out(y, X[:, :2], list(frame["family"])), rel=1e-10)


def test_a_family_that_alone_determines_the_regression_cannot_be_left_out():
    frame = family_frame(np.random.default_rng(0)).assign(only_f0=lambda f: (f["family"] == "f0") * 1.0)
    found = nested_models(frame, score="score", predictor="coupling", covariates=["only_f0"], family="family")
    assert math.isnan(found.with_predictor.r2_left_out_family) and not math.isnan(found.with_predictor.r2_left_out)
    assert "not possible" in in_words(found)


def test_nested_models_have_their_size_coverage_and_power():
    """A predictor that only follows a covariate adds nothing, though it correlates strongly with the score."""

    def one(rng):
        size = rng.normal(size=25)
        follows, own = size + 0.7 * rng.normal(size=25), rng.normal(size=25)
        frame = pd.DataFrame({"score": size + 0.6 * own + 0.5 * rng.normal(size=25), "size": size, "a": follows, "b": own})
        a, b = (nested_models(frame, score="score", predictor=name, covariates=["size"]) for name in "ab")
        gain = [f.with_predictor.r2_left_out > f.without.r2_left_out and f.p < 0.05 for f in (a, b)]
        return (
            a.p,
            covers(a.effect, 0),
            covers(b.effect, 0.6),
            correlation(follows, frame["score"], resamples=1).low > 0,
            *gain,
        )

    p, *rates = draws(one, 100)
    coverage, of_effect, correlated, false_gain, gain = np.mean(rates, axis=1)
    assert uniform(p) and near(coverage, 0.95, 100) and near(of_effect, 0.95, 100)
    assert correlated > 0.8 and false_gain < 0.1 and gain > 0.95


def test_mixed_model_of_balanced_families_is_the_fixed_effects_estimate():
    """Where the predictor has the same mean in every family, random and fixed levels give the same coefficient and error."""
    frame = family_frame(np.random.default_rng(5), effect=0.7)
    frame["coupling"] -= frame.groupby("family")["coupling"].transform("mean")
    X = np.column_stack([frame["coupling"], pd.get_dummies(frame["family"], dtype=float)])
    beta, squares = np.linalg.lstsq(X, frame["score"], rcond=None)[:2]
    stderr = math.sqrt(squares[0] / (24 - 7) / np.sum(frame["coupling"] ** 2))
    found = family_effect(frame, score="score", predictor="coupling", family="family")
    assert (found.effect.value, found.effect.stderr) == pytest.approx((beta[0], stderr), rel=1e-4)
    assert 0 < found.family_share < 1 and found.families == 6


def test_clustered_errors_against_the_sandwich():
    frame = family_frame(np.random.default_rng(6), effect=0.7)
    X, y = np.column_stack([np.ones(24), frame["coupling"]]), frame["score"].to_numpy()
    bread = np.linalg.inv(X.T @ X)
    residual = y - X @ bread @ X.T @ y
    scores = pd.DataFrame(X * residual[:, None]).groupby(frame["family"].to_numpy()).sum().to_numpy()
    variance = bread @ scores.T @ scores @ bread * 6 / 5 * 23 / 22
    found = family_effect(frame, score="score", predictor="coupling", family="family", method="cluster")
    assert found.effect.value == pytest.approx((bread @ X.T @ y)[1])
    assert found.effect.stderr == pytest.approx(math.sqrt(variance[1, 1]))
    assert found.effect.high - found.effect.value == pytest.approx(stats.t.ppf(0.975, 5) * found.effect.stderr)


def test_families_that_resemble_each_other_fool_plain_least_squares_only():
    """Nothing depends on the predictor, but both it and the score go by family: 12 families of 4 models."""

    def one(rng):
        frame = family_frame(rng, families=12, between=True)
        mixed = family_effect(frame, score="score", predictor="coupling", family="family")
        plain = nested_models(frame, score="score", predictor="coupling", family="family")
        assert any("12 families" in note for note in plain.notes) and any("few" in note for note in mixed.notes)
        return mixed.p < 0.05, covers(mixed.effect, 0), plain.p < 0.05

    mixed, coverage, plain = simulate(one, 60)
    assert near(mixed, 0.05, 60) and near(coverage, 0.95, 60)
    assert plain > 0.12


def test_clustered_errors_have_their_size_in_many_families():
    def one(rng):
        frame = family_frame(rng, families=40, between=True)
        return family_effect(frame, score="score", predictor="coupling", family="family", method="cluster").p < 0.05

    assert near(simulate(one, 300), 0.05, 300, slack=0.02)  # asymptotic in the number of families


def test_families_that_cannot_be_told_apart_say_why():
    frame = family_frame(np.random.default_rng(0))
    of = {"score": "score", "predictor": "coupling", "family": "family"}
    assert "2 families" in family_effect(frame[:8], **of).reason
    assert "one model only" in family_effect(frame.assign(family=range(24)), **of).reason
    frame["score"] -= frame.groupby("family")["score"].transform("mean")
    none = family_effect(frame, **of)
    assert none.family_share < 1e-3 and any("no variance between families" in note for note in none.notes)


def test_adjusted_p_values_as_published():
    """Benjamini and Hochberg (1995), section 4.1: of 15 tests at 0.05 Holm rejects 3 and their procedure 4."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528, 0.759, 1]
    assert (adjust_p_values(p, "holm") <= 0.05).tolist() == [True] * 3 + [False] * 12
    assert (adjust_p_values(p, "fdr_bh") <= 0.05).tolist() == [True] * 4 + [False] * 11
    assert adjust_p_values(p, "fdr_bh")[3] == pytest.approx(0.0095 * 15 / 4)


def test_missing_tests_do_not_count():
    adjusted = adjust_p_values([0.01, math.nan, 0.04], "holm")
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.04]) and math.isnan(adjusted[1])
    assert np.isnan(adjust_p_values([math.nan])).all()
    with pytest.raises(CouplingError, match="between 0 and 1"):
        adjust_p_values([0.5, 1.2])


# Documents


def test_auroc_of_iris_as_published():
    """R's pROC on iris, sepal length of setosa against the others: 0.9586, 95% interval (DeLong) 0.9302 to 0.9870."""
    iris = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the data").load_iris()
    found = auroc(iris.data[:, 0], iris.target != 0)
    assert found.auroc == pytest.approx(0.9586, abs=1e-10)
    assert (found.auroc - 1.959964 * found.stderr, found.auroc + 1.959964 * found.stderr) == pytest.approx(
        (0.93020851, 0.98699149), abs=1e-7
    )
    assert (found.right, found.wrong) == (100, 50) and 0.91 < found.low < found.auroc < found.high < 0.987


def test_auroc_with_ties_against_all_pairs():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(1, 6, 13), rng.integers(0, 5, 9)
    beats = np.array([[float(r > w) + 0.5 * (r == w) for w in wrong] for r in right])
    variance = beats.mean(axis=1).var(ddof=1) / 13 + beats.mean(axis=0).var(ddof=1) / 9
    found = auroc(np.r_[right, wrong], np.repeat([1, 0], [13, 9]))
    assert (found.auroc, found.stderr) == pytest.approx((beats.mean(), math.sqrt(variance)), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_aurocs_cover(shift):
    truth = stats.norm.cdf(shift / math.sqrt(2))

    def one(rng):
        found = auroc(np.r_[rng.normal(size=25) + shift, rng.normal(size=15)], np.repeat([1, 0], [25, 15]))
        return covers(found, truth), found.p

    covered, p = draws(one, 500)
    assert near(covered.mean(), 0.95, 500, slack=0.015)  # asymptotic
    assert uniform(p) if shift == 0 else np.mean(p < 0.05) > 0.75


def test_pooled_aurocs_of_tasks_against_their_formula():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"value": rng.normal(size=60), "right": rng.permutation(60) % 2, "task": np.arange(60) // 20})
    frame.loc[:9, "right"] = 1
    by_task, pooled = auroc_within(frame, "value", "right", "task")
    pairs = np.array([f.right * f.wrong for f in by_task.values()])
    stderrs = np.array([f.stderr for f in by_task.values()])
    assert pooled.auroc == pytest.approx(pairs @ [f.auroc for f in by_task.values()] / pairs.sum())
    assert pooled.stderr == pytest.approx(math.sqrt(pairs**2 @ stderrs**2) / pairs.sum()) and pooled.tasks == 3
    one = auroc_within(frame.assign(task="all"), "value", "right", "task")[1]
    right, wrong = frame["value"][frame["right"] == 1], frame["value"][frame["right"] == 0]
    expected = stats.mannwhitneyu(right, wrong, method="asymptotic", use_continuity=False).pvalue
    assert one.p == pytest.approx(expected, rel=1e-10)


def test_aurocs_without_an_interval_say_why():
    assert "2 of each" in auroc([1, 2, 3], [1, 1, 0]).reason
    perfect = auroc([1, 2, 3, 4], [0, 0, 1, 1])
    assert perfect.auroc == 1 and math.isnan(perfect.low) and "separated perfectly" in perfect.reason
    assert "same value" in auroc([1, 1, 1, 1], [0, 0, 1, 1]).reason
    with pytest.raises(CouplingError, match="0.5 as correct"):
        auroc([1, 2, 3], [1, 0.5, 0])


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


def test_odds_ratios_cover():
    def one(rng):
        frame = documents(rng, n=400, effect=0.8)
        found = logistic_effect(frame, correct="correct", predictor="own", controls=["length"], task="task")
        truth = 0.8 * frame["own"].std()
        assert found.tasks >= 5 and found.odds_ratio == pytest.approx(math.exp(found.log_odds.value))
        return covers(found.log_odds, truth), found.p < 0.05

    coverage, power = simulate(one, 100)
    assert near(coverage, 0.95, 100, slack=0.01) and power > 0.95


def test_logistic_effect_as_published():
    """Spector and Mazzeo's data in Greene's Econometric Analysis: PSI 2.379 (1.065), log likelihood −12.890."""
    data = sm.datasets.spector.load_pandas()
    frame = data.exog.assign(GRADE=data.endog)
    found = logistic_effect(frame, correct="GRADE", predictor="PSI", controls=["GPA", "TUCE"])
    unit = frame["PSI"].std()
    assert (round(found.log_odds.value / unit, 3), round(found.log_odds.stderr / unit, 3)) == (2.379, 1.065)
    without = sm.Logit(frame["GRADE"], sm.add_constant(frame[["GPA", "TUCE"]])).fit(disp=False).llf
    assert found.p == pytest.approx(stats.chi2.sf(2 * (-12.889634 - without), 1), rel=1e-4)
    assert any("10 answers of the rarer kind" in note for note in found.notes)


@pytest.mark.parametrize(
    "value, separated", [([1, 2, 3, 4, 5, 6], True), ([1, 2, 3, 3, 4, 5], True), ([1, 2, 4, 3, 5, 6], False)]
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
    assert found.dropped == 10 and found.tasks == 6 and found.odds_ratio == pytest.approx(expected.odds_ratio)
    by_task, pooled = auroc_within(pd.concat([frame, easy]), "coupling", "correct", "task")
    before = auroc_within(frame, "coupling", "correct", "task")[1]
    assert by_task["easy"].reason and pooled.dropped == before.dropped + 10 and pooled.auroc == before.auroc
    pairs = {name: f.right * f.wrong for name, f in by_task.items() if f.reason is None}
    assert pooled.auroc == pytest.approx(sum(by_task[k].auroc * v for k, v in pairs.items()) / sum(pairs.values()))


def test_accuracy_by_bin():
    rng = np.random.default_rng(0)
    value = rng.uniform(size=2000)
    table = accuracy_by_bin(value, rng.random(2000) < value, bins=5)
    assert table["n"].tolist() == [400] * 5
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).sum() >= 4  # calibrated by construction
    assert (table["bin_high"][:-1].to_numpy() == table["bin_low"][1:].to_numpy()).all()
    assert accuracy_by_bin([1, 1, 1, 2], [0, 1, 1, 1], bins=10)["n"].sum() == 4
    assert accuracy_by_bin([], []).empty


def test_wilsons_interval_as_published():
    """Newcombe (1998): 81 of 263 has the 95% interval 0.2553 to 0.3662."""
    table = accuracy_by_bin(np.ones(263), np.arange(263) < 81)
    assert (round(table["low"][0], 4), round(table["high"][0], 4)) == (0.2553, 0.3662)


# Results and words


def test_results_are_rows_of_a_table():
    frame = as_frame([line_fit(*ANSCOMBE), exponential_fit(*ANSCOMBE, resamples=9)])
    assert len(frame) == 2 and {"slope", "slope_stderr", "slope_low", "c_high", "r2", "p", "notes"} <= set(frame.columns)
    row = nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS).to_dict()
    assert row["covariates"] == "; ".join(OTHERS) and "without_aic" in row and "partial_coefficient" in row
    assert not any(isinstance(cell, dict | tuple | np.ndarray) for cell in row.values())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: correlation([1, 2, 3], [1, 2]), "lengths"),
        (lambda: correlation(["a", "b", "c"], [1, 2, 3]), "x that is not numeric"),
        (lambda: correlation([1, 2, 3], [1, 2, 3], method="cosine"), "pearson, spearman, kendall"),
        (lambda: correlation([1, 2, 3], [1, 2, 3], confidence=95), "confidence=95"),
        (lambda: partial_correlation(LONGLEY, "GNP", "speed", []), "no column 'speed'"),
        (lambda: nested_models(LONGLEY, score="GNP", predictor="POP", covariates=["POP"]), "each of them once"),
        (
            lambda: family_effect(LONGLEY, score="GNP", predictor="POP", family="YEAR", method="fixed"),
            "'mixed' or 'cluster'",
        ),
        (lambda: accuracy_by_bin([1], [1], bins=0), "bins=0"),
    ],
)
def test_mistakes_are_said(call, message):
    from jaxtyping import TypeCheckError

    with pytest.raises((CouplingError, TypeCheckError)) as caught:
        call()
    assert isinstance(caught.value, TypeCheckError) or message in str(caught.value)


def test_words_state_what_was_found():
    x = np.arange(20.0)
    words = in_words(correlation(x, x + 3 * np.sin(7 * x)), x="coupling", y="accuracy")
    assert words.startswith("Pearson correlation of coupling (x) with accuracy (y): 0.9") and "20 models" in words
    assert "95% interval 0." in words and words.endswith("Higher coupling goes with higher accuracy.")
    assert "goes with lower accuracy" in in_words(correlation(x, -x + 3 * np.sin(7 * x)), y="accuracy")
    assert "goes with lower score" in in_words(line_fit(x, -x + 3 * np.sin(7 * x)))
    falling = in_words(exponential_fit(x, np.exp(-0.2 * x) + 0.01 * np.sin(7 * x)))
    assert "goes with lower score, and a straight line fits worse" in falling


def findings(rng, n):
    frame = pd.DataFrame(rng.normal(size=(n, 4)), columns=["score", "coupling", "size", "other"])
    frame["correct"], frame["family"] = rng.permutation(n) % 2, np.arange(n) // 3
    of = {"score": "score", "predictor": "coupling"}
    yield correlation(frame["coupling"], frame["score"], resamples=199)
    yield correlation(frame["coupling"], frame["score"], method="spearman", resamples=199)
    yield compare_correlations(frame["score"], frame["coupling"], frame["other"])
    yield line_fit(frame["coupling"], frame["score"])
    yield exponential_fit(frame["coupling"], frame["score"], resamples=199)
    yield nested_models(frame, **of, covariates=["size"], family="family")
    yield family_effect(frame, **of, family="family", method="cluster")
    yield auroc(frame["coupling"], frame["correct"])
    yield logistic_effect(frame, correct="correct", predictor="coupling", controls=["size"])


CLAIMS = ("goes with", "tend to have", "is larger than", "coupling says something")


def test_words_claim_nothing_from_nothing():
    """Nothing depends on anything; a claim may be made no more often than the test's 5% (few families: the note says so)."""
    claims = []
    for i in range(25):
        for found in findings(np.random.default_rng([1, i]), 24):
            words = in_words(found)
            claimed = any(claim in words for claim in CLAIMS)
            assert claimed or "o evidence" in words or "o clear evidence" in words, words
            assert not claimed or found.p < 0.05
            claims.append(claimed)
    assert 0 < np.mean(claims) < 0.1


@pytest.mark.parametrize("n", [3, 5, 7])
def test_words_claim_nothing_from_few(n):
    for found in findings(np.random.default_rng(0), n):
        words = in_words(found)
        assert "too few" in words or "undefined" in words or "no interval" in words, words
        assert not any(claim in words for claim in CLAIMS)


def test_words_need_interval_and_test_to_agree():
    def words(low, p):
        return in_words(Correlation("pearson", coefficient=0.4, low=low, high=0.7, p=p, n=20))

    assert words(0.01, 0.04).endswith("Higher coupling goes with higher score.")
    assert words(-0.01, 0.04).endswith("No evidence that coupling and score go together: the interval includes 0.")
    assert words(0.01, 0.06).endswith(
        "No clear evidence that coupling and score go together: the test does not reject chance."
    )
    assert words(math.nan, 0.04).endswith("Higher coupling goes with higher score.")


def test_words_heed_the_adjusted_p_value():
    x = np.arange(20.0)
    found = correlation(x, x + 8 * np.sin(7 * x))
    assert found.p < 0.05 and "goes with higher" in in_words(found)
    words = in_words(found, p_adjusted=0.2)
    assert "adjusted p = 0.2" in words and "No clear evidence" in words and "goes with" not in words


def test_words_count_what_was_left_out_and_keep_the_notes():
    assert "1 observations were left out" in in_words(correlation([*range(9), math.nan], [*range(9), 3]))
    assert "is hard to tell" in in_words(nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS))
    scattered = line_fit(np.arange(9.0), np.arange(9) + 5 * np.sin(np.arange(9)), y_error=np.full(9, 0.1))
    assert "times as much as their errors explain" in in_words(scattered)


def test_correlations_need_no_statsmodels_and_regressions_say_so():
    program = """
import sys
sys.modules["statsmodels"] = None
from lm_eval_coupling.statistics import correlation, line_fit
print(correlation([1, 2, 3, 4], [1, 3, 2, 4], resamples=9).n)
assert not any(name in sys.modules for name in ("torch", "lm_eval"))
try:
    line_fit([1, 2, 3], [1, 2, 4])
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.startswith("4\n") and "lm-eval-coupling[analysis]" in ran.stdout, ran.stderr
