"""Comparison of how strongly two predictors correlate with one score."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.statistics.correlations import pearson, pearson_without_each, undefined
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Result,
    Values,
    complete,
    is_constant,
)
from lm_eval_coupling.statistics.resampling import (
    Families,
    Units,
    fisher_interval,
    jackknife_error,
    permutation_p_value,
)


@dataclasses.dataclass(frozen=True)
class CorrelationDifference(Result):
    """Strengths of the correlations of one score with two predictors.

    ``first`` and ``second`` keep their signs; ``between`` is the predictors' own correlation.
    ``difference`` is ``|first| − |second|``, and ``low`` and ``high`` are its interval. ``t`` is
    Williams'.
    """

    first: float = math.nan
    second: float = math.nan
    between: float = math.nan
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    t: float = math.nan
    p: float = math.nan
    n: int = 0
    dropped: int = 0
    confidence: float = CONFIDENCE
    reason: str | None = None
    families: int = 0


def compare_correlations(
    score: Values,
    first: Values,
    second: Values,
    *,
    family: Families | None = None,
    resamples: int = 4999,
    seed: int = 0,
) -> CorrelationDifference:
    """Compare the strengths |r| with which two predictors correlate (Pearson) with a score.

    Both predictors are treated alike: each is scaled and turned to correlate positively. The test
    exchanges the two within observations drawn at random, or within whole families, and keeps the
    exchanges that leave both correlations positive, as the turning did. The interval is the
    jackknife's, over families if there are some, or else Zou's (2007) where that is wider. For two
    correlations near 0 it is too wide.

    Args:
        score: One number per observation.
        first: As many numbers, of the first predictor.
        second: As many numbers, of the second one.
        family: Family of each observation, if models come in families.
        resamples: Number of random exchanges.
        seed: Seed of the exchanges.

    Returns:
        Both correlations, and the difference of their strengths with its interval and p, or the
        ``reason`` why there is none.

    Raises:
        CouplingError: If the columns differ in length or are not numeric.
    """
    codes = None if family is None else pd.factorize(pd.Series(list(family)).astype(str))[0]
    columns, dropped = complete(score=score, first=first, second=second, family=codes)
    units = Units.of(columns.pop("family", None), len(columns["score"]))
    n = len(columns["score"])
    result = CorrelationDifference(n=n, dropped=dropped, families=units.families)
    if reason := undefined(columns, least=4):
        return result.with_reason(reason)
    y, a, b = (stats.zscore(values) for values in columns.values())
    r = np.corrcoef([y, a, b])
    signs = np.where(r[0, 1:] < 0, -1.0, 1.0)
    aligned = difference_of_correlations(abs(r[0, 1]), abs(r[0, 2]), r[1, 2] * signs.prod(), n)
    result = dataclasses.replace(
        aligned,
        first=float(r[0, 1]),
        second=float(r[0, 2]),
        between=float(r[1, 2]),
        dropped=dropped,
        families=units.families,
    )
    if is_constant(np.append(signs[0] * a - signs[1] * b, 0.0)) or abs(r[1, 2]) > 1 - 1e-9:
        return dataclasses.replace(
            result, p=math.nan, reason="the predictors determine each other exactly"
        )
    if result.reason:
        return result
    differences = _exchanged(y, signs[0] * a, signs[1] * b, units, resamples, seed)
    p = permutation_p_value(result.difference, differences)
    if 0 < units.families < 3:
        reason = f"no interval from {units.families} families"
        return dataclasses.replace(result, p=p, low=math.nan, high=math.nan, reason=reason)
    without = [np.abs(pearson_without_each(v, y, units)) for v in (a, b)]
    error = jackknife_error(without[0] - without[1], result.difference)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, units.number - 1)) * error
    low, high = result.difference - half, result.difference + half
    if not units.families:
        low, high = min(low, result.low), max(high, result.high)
    return dataclasses.replace(result, p=p, low=max(-1.0, low), high=min(1.0, high))


def difference_of_correlations(
    first: float, second: float, between: float, n: int
) -> CorrelationDifference:
    """Compare two signed correlations with one score, given three coefficients.

    Returns:
        Williams' t with n − 3 degrees of freedom (Steiger 1980, eq. 7) and Zou's interval (2007),
        both for independent observations of a normal distribution.
    """
    a, b, c = float(first), float(second), float(between)
    result = CorrelationDifference(a, b, c, a - b, n=n)
    determinant = 1 - a**2 - b**2 - c**2 + 2 * a * b * c
    spread = 2 * (n - 1) / (n - 3) * determinant + ((a + b) / 2) ** 2 * (1 - c) ** 3
    if spread < 1e-12 or max(abs(a), abs(b)) > 1 - 1e-12:
        return result.with_reason("the columns determine each other exactly")
    t = (a - b) * math.sqrt((n - 1) * (1 + c) / spread)
    (low_a, high_a), (low_b, high_b) = (fisher_interval(r, 1 / (n - 3)) for r in (a, b))
    shared = ((c - a * b / 2) * (1 - a**2 - b**2 - c**2) + c**3) / ((1 - a**2) * (1 - b**2))
    down, up = (a - low_a, high_b - b), (high_a - a, b - low_b)
    low, high = (
        a - b + sign * math.sqrt(max(0.0, u**2 + v**2 - 2 * shared * u * v))
        for sign, (u, v) in ((-1, down), (1, up))
    )
    return dataclasses.replace(
        result, low=low, high=high, t=t, p=float(2 * stats.t.sf(abs(t), n - 3))
    )


def _exchanged(
    y: np.ndarray, a: np.ndarray, b: np.ndarray, units: Units, resamples: int, seed: int
) -> np.ndarray:
    """Return the differences of two positive correlations after exchanges at random.

    Exchanges that turn a correlation negative are left out. With them the test would be too
    strict for weak correlations: the turned data never have such a sign.
    """
    a, b = (_scaled(v) for v in (a, b))
    rng = np.random.default_rng(seed)
    is_exchanged = (rng.random((resamples, units.number)) < 0.5)[:, units.codes]
    first, second = (pearson(np.where(is_exchanged, *pair), y) for pair in ((b, a), (a, b)))
    return (first - second)[(first >= 0) & (second >= 0)]


def _scaled(values: np.ndarray) -> np.ndarray:
    """Return values of median 0 and mean absolute deviation 1.

    Exchanged numbers need one scale. One outlier decides the standard deviation of skewed data:
    with it, twice as many tests as promised rejected equal strengths.
    """
    centered = values - np.median(values)
    return centered / np.abs(centered).mean()
