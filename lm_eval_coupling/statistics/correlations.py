"""Correlations with intervals and permutation tests, and the comparison of two that share a variable."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    Result,
    Values,
    check_confidence,
    complete,
    complete_rows,
    constant,
)

MANY = (
    200  # above this, resampling says what large-sample theory says, in seconds instead of at once
)
FEW = 8  # below this, intervals of rank correlations are not to be had, and words claim nothing

Method = Literal["pearson", "spearman", "kendall"]


@dataclasses.dataclass(frozen=True)
class Correlation(Result):
    """A correlation coefficient with its interval; ``given`` counts the numbers that were held fixed."""

    method: str
    coefficient: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    n: int = 0
    dropped: int = 0
    given: int = 0
    confidence: float = 0.95
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class CorrelationDifference(Result):
    """``first − second`` for the correlations of one variable with two others, whose own correlation is ``between``."""

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
    confidence: float = 0.95
    reason: str | None = None


def correlation(
    x: Values,
    y: Values,
    *,
    method: Method = "pearson",
    confidence: float = 0.95,
    resamples: int = 4999,
    seed: int = 0,
) -> Correlation:
    """Correlate, with a two-sided permutation test (exact where all permutations fit into ``resamples``).

    Pearson's interval is Fisher's z; Spearman's and Kendall's (tau-b) are BCa bootstrap intervals, from 8 pairs on. Above
    200 pairs all of it is large-sample theory: scipy's tests, and Fisher's z with the variances of Bonett and Wright (2000).
    Pairs with a missing number are dropped and counted.

    Returns:
        The coefficient with its interval and p, or a ``reason`` why there is none.

    Raises:
        CouplingError: if x and y differ in length or are not numeric, or the method is unknown.
    """
    if method not in _COEFFICIENTS:
        raise CouplingError(f"got method={method!r}, expected one of {', '.join(_COEFFICIENTS)}")
    check_confidence(confidence)
    pairs, dropped = complete(x=x, y=y)
    found = Correlation(method, n=len(pairs["x"]), dropped=dropped, confidence=confidence)
    if reason := _undefined(pairs):
        return dataclasses.replace(found, reason=reason)
    x, y = pairs["x"], pairs["y"]
    if len(x) > MANY:
        return _large_sample(x, y, found)
    found = dataclasses.replace(
        found,
        coefficient=float(_COEFFICIENTS[method](x, y)),
        p=_permutation_p(x, y, method, resamples, seed),
    )
    if method == "pearson":
        low, high = _fisher_interval(
            found.coefficient, 1 / (len(x) - 3) if len(x) > 3 else math.inf, confidence
        )
        return dataclasses.replace(found, low=low, high=high)
    if len(x) < FEW:
        return dataclasses.replace(
            found, reason=f"no interval from {len(x)} pairs, which are too few for a bootstrap"
        )
    low, high = _bootstrap_interval(x, y, method, confidence, resamples, seed)
    reason = "no interval, as all resamples agree" if math.isnan(low) else None
    return dataclasses.replace(found, low=low, high=high, reason=reason)


def partial_correlation(
    frame: pd.DataFrame, x: str, y: str, given: Sequence[str], *, confidence: float = 0.95
) -> Correlation:
    """Pearson correlation of the columns x and y with the columns ``given`` held fixed (t test, Fisher's z).

    Returns:
        The correlation of what is left of x and y, or a ``reason`` why there is none.

    Raises:
        CouplingError: if a column is missing or not numeric.
    """
    rows, dropped = complete_rows(frame, [x, y, *given])
    fixed = np.column_stack([np.ones(len(rows)), *(rows[name] for name in given)])
    return _of_residuals(
        "partial pearson", rows[x].to_numpy(), rows[y].to_numpy(), fixed, dropped, confidence
    )


def correlation_within(
    frame: pd.DataFrame,
    x: str,
    y: str,
    group: str,
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    confidence: float = 0.95,
) -> Correlation:
    """Correlation of the columns x and y within groups, pooled: every group has its own level (fixed effects).

    Spearman's ranks are taken within each group and scaled to [0, 1]. Groups of one are dropped and counted. The test is
    Student's t with one degree of freedom less for every group; the interval is Fisher's z, for ranks with the variance
    of Bonett and Wright (2000).

    Returns:
        The coefficient with its interval and p, or a ``reason`` why there is none.

    Raises:
        CouplingError: if a column is missing or not numeric, or the method is unknown.
    """
    if method not in ("pearson", "spearman"):
        raise CouplingError(f"got method={method!r}, expected 'pearson' or 'spearman'")
    rows, dropped = complete_rows(frame, [x, y], [group])
    alone = ~rows[group].duplicated(keep=False)
    rows, dropped = rows[~alone], dropped + int(alone.sum())
    values = rows[[x, y]]
    if method == "spearman":
        sizes = rows.groupby(group)[x].transform("size")
        values = rows.groupby(group)[[x, y]].rank().sub(1).div(sizes - 1, axis=0)
    levels = pd.get_dummies(rows[group], dtype=float).to_numpy()
    return _of_residuals(
        f"{method} within groups",
        values[x].to_numpy(),
        values[y].to_numpy(),
        levels,
        dropped,
        confidence,
    )


def compare_correlations(
    score: Values, first: Values, second: Values, *, confidence: float = 0.95
) -> CorrelationDifference:
    """Whether ``first`` correlates (Pearson) more with the score than ``second`` does, over the same observations.

    Signs count: turn a predictor around that is expected to correlate negatively. Williams' t with n − 3 degrees of
    freedom (Steiger 1980, eq. 7); the interval of the difference is Zou's (2007).

    Returns:
        Both correlations and their difference with its interval and p, or a ``reason`` why there is none.

    Raises:
        CouplingError: if the columns differ in length or are not numeric.
    """
    check_confidence(confidence)
    columns, dropped = complete(score=score, first=first, second=second)
    n = len(columns["score"])
    if reason := _undefined(columns, least=4):
        return CorrelationDifference(n=n, dropped=dropped, confidence=confidence, reason=reason)
    r = np.corrcoef(list(columns.values()))
    found = difference_of_correlations(r[0, 1], r[0, 2], r[1, 2], n, confidence=confidence)
    return dataclasses.replace(found, dropped=dropped)


def difference_of_correlations(
    first: float, second: float, between: float, n: int, *, confidence: float = 0.95
) -> CorrelationDifference:
    """``compare_correlations`` from three coefficients over n observations."""
    a, b, c = float(first), float(second), float(between)
    found = CorrelationDifference(a, b, c, a - b, n=n, confidence=confidence)
    determinant = 1 - a**2 - b**2 - c**2 + 2 * a * b * c
    spread = 2 * (n - 1) / (n - 3) * determinant + ((a + b) / 2) ** 2 * (1 - c) ** 3
    if spread < 1e-12 or max(abs(a), abs(b)) > 1 - 1e-12:
        return dataclasses.replace(found, reason="the columns determine each other exactly")
    t = (a - b) * math.sqrt((n - 1) * (1 + c) / spread)
    (low_a, high_a), (low_b, high_b) = (
        _fisher_interval(r, 1 / (n - 3), confidence) for r in (a, b)
    )
    together = ((c - a * b / 2) * (1 - a**2 - b**2 - c**2) + c**3) / ((1 - a**2) * (1 - b**2))
    down, up = (a - low_a, high_b - b), (high_a - a, b - low_b)
    low, high = (
        a - b + sign * math.sqrt(max(0.0, u**2 + v**2 - 2 * together * u * v))
        for sign, (u, v) in ((-1, down), (1, up))
    )
    return dataclasses.replace(
        found, low=low, high=high, t=t, p=float(2 * stats.t.sf(abs(t), n - 3))
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    # A resample may repeat one pair only; it shows no correlation.
    return np.divide((x * y).sum(axis=-1), norm, out=np.zeros_like(norm), where=norm > 0)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))


def _kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """tau-b: the cosine between the signs of all differences."""
    i, j = np.triu_indices(x.shape[-1], 1)
    x, y = (np.sign(v[..., i] - v[..., j]) for v in (x, y))
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), norm, out=np.zeros_like(norm), where=norm > 0)


_COEFFICIENTS = {"pearson": _pearson, "spearman": _spearman, "kendall": _kendall}


def _large_sample(x: np.ndarray, y: np.ndarray, found: Correlation) -> Correlation:
    test = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}[
        found.method
    ](x, y)
    r, n = float(test.statistic), len(x)
    variance = {
        "pearson": 1 / (n - 3),
        "spearman": (1 + r**2 / 2) / (n - 3),
        "kendall": 0.437 / (n - 4),
    }[found.method]
    low, high = _fisher_interval(r, variance, found.confidence)
    return dataclasses.replace(found, coefficient=r, low=low, high=high, p=float(test.pvalue))


def _permutation_p(
    x: np.ndarray, y: np.ndarray, method: Method, resamples: int, seed: int
) -> float:
    coefficient = _COEFFICIENTS[method]
    if method == "spearman":
        x, y, coefficient = (
            stats.rankdata(x),
            stats.rankdata(y),
            _pearson,
        )  # ranked once, as ranks permute with x
    test = stats.permutation_test(
        (x,),
        lambda x, axis: coefficient(x, y),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(len(x), method),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _bootstrap_interval(
    x: np.ndarray, y: np.ndarray, method: Method, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the interval is NaN then
        interval = stats.bootstrap(
            (x, y),
            lambda x, y, axis: _COEFFICIENTS[method](x, y),
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            n_resamples=resamples,
            batch=_batch(len(x), method),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch(n: int, method: Method) -> int:
    """How many resamples are held at once: 32 MB of them."""
    return max(1, 4_000_000 // (n**2 if method == "kendall" else n))


def _undefined(columns: dict[str, np.ndarray], least: int = 3) -> str | None:
    n = len(next(iter(columns.values())))
    if n < least:
        return f"{n} complete observations, at least {least} are needed"
    return next(
        (f"{name} is constant" for name, values in columns.items() if constant(values)), None
    )


def _of_residuals(
    method: str, x: np.ndarray, y: np.ndarray, fixed: np.ndarray, dropped: int, confidence: float
) -> Correlation:
    """Correlation of what ``fixed`` (whose columns span the constant) leaves of x and y."""
    check_confidence(confidence)
    given = int(np.linalg.matrix_rank(fixed)) - 1 if len(x) else 0
    found = Correlation(method, n=len(x), dropped=dropped, given=given, confidence=confidence)
    df = len(x) - 2 - given
    if df < 1:
        return dataclasses.replace(
            found, reason=f"{len(x)} observations with {given} numbers held fixed are too few"
        )
    residuals = [v - fixed @ np.linalg.lstsq(fixed, v, rcond=None)[0] for v in (x, y)]
    for name, v, residual in zip(("x", "y"), (x, y), residuals, strict=True):
        if np.linalg.norm(residual) <= 1e-10 * np.linalg.norm(v):
            return dataclasses.replace(
                found, reason=f"{name} is constant once the others are held fixed"
            )
    r = float(_pearson(*residuals))
    with np.errstate(divide="ignore"):
        t = r * np.sqrt(df / np.maximum(1 - r**2, 0.0))
    variance = (
        (1 + r**2 / 2 if method.startswith("spearman") else 1.0) / (df - 1) if df > 1 else math.inf
    )
    low, high = _fisher_interval(r, variance, confidence)
    return dataclasses.replace(
        found, coefficient=r, low=low, high=high, p=float(2 * stats.t.sf(abs(t), df))
    )


def _fisher_interval(r: float, variance: float, confidence: float) -> tuple[float, float]:
    """Fisher's interval, given the variance of artanh r."""
    if abs(r) >= 1 and math.isinf(variance):
        return -1.0, 1.0
    half = stats.norm.ppf((1 + confidence) / 2) * math.sqrt(variance)
    with np.errstate(divide="ignore"):
        center = np.arctanh(np.clip(r, -1, 1))
    return float(np.tanh(center - half)), float(np.tanh(center + half))
