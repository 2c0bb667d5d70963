"""Lines and exponentials against published fits, and in simulations whose truth is known."""

import math

import numpy as np
import pytest
from published import ANSCOMBE
from scipy import optimize, stats
from simulations import covers, draws, near, simulate, uniform

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    exponential_fit,
    in_words,
    line_fit,
    proportion_error,
)
from lm_eval_coupling.statistics.curves import _growth, _growth_gradient

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


PEARSON_YORK = {
    "x": [0, 0.9, 1.8, 2.6, 3.3, 4.4, 5.2, 6.1, 6.5, 7.4],
    "y": [5.9, 5.4, 4.4, 4.6, 3.5, 3.7, 2.8, 2.8, 2.4, 1.5],
    "x_error": np.array([1000, 1000, 500, 800, 200, 80, 60, 20, 1.8, 1]) ** -0.5,
    "y_error": np.array([1, 1.8, 4, 8, 20, 20, 70, 70, 100, 500]) ** -0.5,
}


@pytest.mark.parametrize("weighted", [True, False])
def test_a_line_far_from_the_origin_is_the_line_near_it(weighted):
    """R² came out as −2,939,227 where x and y differ in their last digits."""
    x, y = map(np.array, ANSCOMBE)
    errors = {"y_error": np.linspace(0.5, 2, len(x))} if weighted else {}
    near, far = (line_fit(x + at, y + at, **errors) for at in (0, 2.0**30))
    assert far.r2 == pytest.approx(near.r2, rel=1e-5) and far.p == pytest.approx(near.p, rel=1e-4)
    slopes = [fit.coefficients["slope"] for fit in (near, far)]
    assert slopes[1].value == pytest.approx(slopes[0].value, rel=1e-5)
    assert slopes[1].stderr == pytest.approx(slopes[0].stderr, rel=1e-5)


def test_line_of_anscombes_first_set():
    """Anscombe (1973): y = 3.00 + 0.500 x, standard error of the slope 0.118, R² 0.667."""
    found = line_fit(*ANSCOMBE)
    slope = found.coefficients["slope"]
    assert round(found.coefficients["intercept"].value, 2) == 3.00
    assert (round(slope.value, 3), round(slope.stderr, 3), round(found.r2, 3)) == (
        0.500,
        0.118,
        0.667,
    )
    expected = stats.linregress(*ANSCOMBE)
    assert found.p == pytest.approx(expected.pvalue)
    assert slope.high - slope.value == pytest.approx(stats.t.ppf(0.975, 9) * expected.stderr)


def test_errors_in_both_as_published():
    """Pearson's data with York's weights: York et al. (2004); digits from the R package bfsl,
    standard errors times √χ²ᵣ.
    """
    found = line_fit(**PEARSON_YORK)
    intercept, slope = found.coefficients["intercept"], found.coefficients["slope"]
    assert (intercept.value, slope.value) == pytest.approx((5.479910224, -0.480533407), abs=1e-9)
    assert found.dispersion**2 == pytest.approx(1.483294149, abs=1e-9)
    assert intercept.stderr / found.dispersion == pytest.approx(0.294970735, abs=1e-9)
    assert slope.stderr / found.dispersion == pytest.approx(0.0579850090, abs=1e-9)
    # There −0.01651, from the mean of the observed x; that of the adjusted x, which York's errors
    # use, is 0.2% smaller.
    assert found.covariance[0, 1] / found.dispersion**2 == pytest.approx(-0.01651, rel=3e-3)


def test_errors_in_both_of_one_size_are_demings():
    x, y = np.array(PEARSON_YORK["x"]), np.array(PEARSON_YORK["y"])
    sxx, syy, sxy = np.var(x), np.var(y), np.cov(x, y, bias=True)[0, 1]
    ratio = 49 / 9
    deming = (syy - ratio * sxx + math.sqrt((syy - ratio * sxx) ** 2 + 4 * ratio * sxy**2)) / (
        2 * sxy
    )
    found = line_fit(x, y, x_error=np.full(10, 3.0), y_error=np.full(10, 7.0))
    assert found.coefficients["slope"].value == pytest.approx(deming, rel=1e-10)
    assert (
        found.dispersion < 1
    )  # errors explain more than the scatter: larger ones still widen the interval
    larger = line_fit(x, y, x_error=np.full(10, 6.0), y_error=np.full(10, 14.0)).coefficients[
        "slope"
    ]
    assert larger.stderr == pytest.approx(2 * found.coefficients["slope"].stderr)


@pytest.mark.slow
def test_lines_cover_and_weights_help():
    def one(rng):
        x, errors = rng.normal(size=15), np.exp(rng.normal(size=15))
        y = 1 + 2 * x + errors * rng.normal(size=15)
        plain, weighted = line_fit(x, y), line_fit(x, y, y_error=errors)
        low, high = weighted.band([0.5])
        slopes = plain.coefficients["slope"], weighted.coefficients["slope"]
        return (
            covers(slopes[1], 2),
            low[0] <= 2 <= high[0],
            *(slope.stderr for slope in slopes),
            weighted.dispersion,
        )

    coverage, of_band, plain, weighted, dispersion = simulate(one, 400)
    assert near(coverage, 0.95, 400) and near(of_band, 0.95, 400)
    assert weighted < plain / 2 and dispersion == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_errors_of_x_flatten_a_plain_line_but_not_yorks():
    def one(rng):
        truth, x_error, y_error = (
            rng.normal(size=25),
            rng.uniform(0.2, 0.6, 25),
            rng.uniform(0.2, 0.6, 25),
        )
        x, y = truth + x_error * rng.normal(size=25), 1 + 2 * truth + y_error * rng.normal(size=25)
        found = line_fit(x, y, x_error=x_error, y_error=y_error)
        slope = found.coefficients["slope"]
        low, high = found.band([1.0])
        flat = line_fit(x, y).coefficients["slope"]
        return (
            slope.value,
            covers(slope, 2),
            covers(found.coefficients["intercept"], 1),
            low[0] <= 3 <= high[0],
            flat.value,
        )

    slope, coverage, of_intercept, of_band, flat = simulate(one, 300)
    assert slope == pytest.approx(2, abs=0.05) and flat < 1.8
    # Never narrowed where the errors explain more than the scatter: on the wide side.
    assert all(near(rate, 0.95, 300, slack=0.02) for rate in (coverage, of_intercept, of_band))


def test_exponential_as_published():
    """R's documented SSasymp fit of Loblolly, seed 329: Asym 94.1282 (8.4030), R0 −8.2508, lrc
    −3.2176 (0.1386).
    """
    age, height = [3, 5, 10, 15, 20, 25], [3.93, 9.34, 26.08, 37.79, 48.31, 56.43]
    found = exponential_fit(age, height)
    a, b, c = (found.coefficients[name] for name in "abc")
    assert (round(a.value, 4), round(a.stderr, 4)) == (94.1282, 8.4030)
    assert round(a.value + b.value, 4) == round(found.predict([0])[0], 4) == -8.2508
    assert (round(math.log(-c.value), 4), round(-c.stderr / c.value, 4)) == (-3.2176, 0.1386)
    assert math.sqrt(np.sum((found.predict(age) - height) ** 2) / 3) == pytest.approx(
        0.7493, abs=5e-5
    )
    low, high = found.band([0])
    assert (high[0] - low[0]) / 2 / stats.t.ppf(0.975, 3) == pytest.approx(1.2261, abs=5e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_exponential_permutation_test_has_its_size_despite_the_search_and_weights():
    def one(rng):
        x, errors = rng.uniform(size=12), np.exp(rng.normal(size=12))
        y, seed = errors * rng.normal(size=12), int(rng.integers(2**31))
        return exponential_fit(x, y, y_error=errors, resamples=99, seed=seed).p

    assert uniform(draws(one, 200))


def test_exponential_with_weights_against_a_direct_fit():
    """In a, b and c themselves, where the optimiser settles only because it starts at the answer;
    and F from two fits.
    """
    rng = np.random.default_rng(4)
    x, errors = rng.uniform(2, 3, 20), np.exp(rng.normal(size=20)) / 3
    y = np.exp(1.5 * (x - 2)) + errors * rng.normal(size=20)
    found, line = exponential_fit(x, y, y_error=errors), line_fit(x, y, y_error=errors)
    values = [found.coefficients[name].value for name in "abc"]
    direct, covariance = optimize.curve_fit(
        lambda x, a, b, c: a + b * np.exp(c * x), x, y, p0=values, sigma=errors
    )
    assert values == pytest.approx(direct, rel=1e-4)
    assert [found.coefficients[name].stderr for name in "abc"] == pytest.approx(
        np.sqrt(np.diag(covariance)), rel=1e-3
    )
    squares = [fit.dispersion**2 * (20 - k) for fit, k in ((line, 2), (found, 3))]
    f = (squares[0] - squares[1]) / (squares[1] / 17)
    assert found.p_curvature == pytest.approx(stats.f.sf(f, 1, 17), rel=1e-8) and f > 1


def test_exponential_is_the_same_in_other_units():
    rng = np.random.default_rng(3)
    x = rng.uniform(size=20)
    y = np.exp(2 * x) + 0.1 * rng.normal(size=20)
    errors = rng.uniform(0.05, 0.2, 20)
    here, there = (
        exponential_fit(x, y, y_error=errors),
        exponential_fit(1000 * x, y / 100, y_error=errors / 100),
    )
    assert there.coefficients["c"].value == pytest.approx(
        here.coefficients["c"].value / 1000, rel=1e-5
    )
    assert there.coefficients["b"].stderr == pytest.approx(
        here.coefficients["b"].stderr / 100, rel=1e-4
    )
    assert (there.r2, there.p, there.dispersion) == pytest.approx(
        (here.r2, here.p, here.dispersion), rel=1e-6
    )


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
    assert (
        "at least 3" in line_fit([1, 2], [1, 2]).reason
        and np.isnan(line_fit([1, 2], [1, 2]).predict([1.0])).all()
    )
    assert line_fit([1, 1, 1], [1, 2, 3]).reason == "x is constant"
    assert line_fit([1, 2, 3], [2, 2, 2]).reason == "y is constant"
    assert "different values" in exponential_fit([1, 1, 2, 2, 2], [1, 2, 3, 4, 5]).reason
    step = exponential_fit([1, 2, 3, 4, 5, 6], [0.01, 0, -0.01, 0.005, 0, 5], resamples=9)
    assert any("not determined" in note for note in step.notes) and math.isnan(
        step.coefficients["c"].stderr
    )


def test_errors_of_zero_are_refused_with_a_remedy():
    """lm-eval gives a score of 0 or 1 a standard error of 0, which is an infinite weight."""
    with pytest.raises(CouplingError, match="proportion_error"):
        line_fit([1, 2, 3], [0.2, 0.5, 1.0], y_error=[0.1, 0.1, 0.0])
    with pytest.raises(CouplingError, match="without y_error"):
        line_fit([1, 2, 3], [0.2, 0.5, 1.0], x_error=[0.1, 0.1, 0.1])
    assert (proportion_error([0.0, 1.0], 20) > 0.04).all()
    assert proportion_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize("slope", [2, 0.1, 1 / 3])
def test_points_on_a_line_are_not_curved(slope):
    """Rounding was taken for curvature: of 2·x it was said that a straight line fits worse."""
    x = np.arange(1.0, 9)
    found = exponential_fit(x, slope * x, resamples=99)
    assert found.p_curvature == 1 and "a straight line describes that as well" in in_words(found)
    curved = exponential_fit(x, np.exp(slope * x), resamples=99)
    assert curved.p_curvature < 1e-6
