"""Reliability of a model's number over documents, and correlations without its noise."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.statistics.correlations import Correlation
from lm_eval_coupling.statistics.estimates import CONFIDENCE, Result

_LEAST = 0.3  # below this reliability a correlation is not corrected: the quotient would be noise
_TARGET = 0.9


@dataclasses.dataclass(frozen=True)
class Reliability(Result):
    """Share of the variance between models that is not noise of the documents.

    ``split_half`` is the correlation over models between means over two random halves of the
    documents, stepped up to all of them (Spearman–Brown); the median over splits. ``alpha`` is the
    same in closed form, the mean over all splits (Cronbach 1951), with its exact interval for
    normal errors (Feldt 1965). ``enough`` documents would give a reliability of 0.9.
    """

    split_half: float = math.nan
    alpha: float = math.nan
    low: float = math.nan
    high: float = math.nan
    models: int = 0
    documents: int = 0
    enough: float = math.nan
    confidence: float = CONFIDENCE
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Corrected(Result):
    """A correlation divided by the root of both reliabilities, taken as known (Spearman 1904)."""

    coefficient: float = math.nan
    low: float = math.nan
    high: float = math.nan
    observed: float = math.nan
    reliability_x: float = math.nan
    reliability_y: float = math.nan
    reason: str | None = None


def document_reliability(values: pd.DataFrame, *, splits: int = 200) -> Reliability:
    """Estimate the reliability of the models' means over the documents that all of them have.

    Args:
        values: One model a row, one document a column; documents that a model lacks are left out.
        splits: Number of random halvings.

    Returns:
        Its estimates with an interval, or the ``reason`` why there are none. Noise larger than
        the differences between models leaves nothing to estimate.
    """
    X = values.dropna(axis=1).to_numpy(np.float64)
    models, documents = X.shape
    result = Reliability(models=models, documents=documents)
    if models < 3 or documents < 2:
        return result.with_reason(
            f"{models} models have {documents} documents in common, at least 3 and 2 are needed"
        )
    between = documents * X.mean(axis=1).var(ddof=1)
    residual = X - X.mean(axis=1, keepdims=True) - X.mean(axis=0, keepdims=True) + X.mean()
    df = (models - 1) * (documents - 1)
    within = (residual**2).sum() / df
    if between <= 1e-24 * np.abs(X).max() ** 2:
        return result.with_reason("the models do not differ")
    alpha = 1 - within / between
    if alpha <= 0:
        return result.with_reason(
            "the documents' noise is larger than the differences between models"
        )
    bounds = stats.f.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], models - 1, df)
    low, high = (1 - (1 - alpha) * bound for bound in bounds)
    # Of one document (Spearman–Brown backwards).
    single = alpha / (documents - (documents - 1) * alpha)
    enough = math.nan
    if 0 < single < 1:
        enough = float(math.ceil(_TARGET * (1 - single) / (single * (1 - _TARGET))))
    halves = _split_half(X, splits, np.random.default_rng(0))
    return dataclasses.replace(
        result, split_half=halves, alpha=alpha, low=max(0.0, low), high=high, enough=enough
    )


def _split_half(X: np.ndarray, splits: int, rng: np.random.Generator) -> float:
    """Return the median over random halvings of 2r/(1 + r); NaN if no half varies.

    The median, because r of few models comes near −1, where the formula has no bound.
    """
    steps = []
    for _ in range(splits):
        order = rng.permutation(X.shape[1])
        half = len(order) // 2
        first, second = X[:, order[:half]].mean(axis=1), X[:, order[half : 2 * half]].mean(axis=1)
        if np.ptp(first) > 0 and np.ptp(second) > 0:
            r = np.corrcoef(first, second)[0, 1]
            steps.append(2 * r / (1 + r) if r > -1 else -math.inf)
    return float(np.median(steps)) if steps else math.nan


def reliability_from_errors(values: pd.Series, errors: pd.Series) -> float:
    """Return 1 − (mean squared standard error) / (variance between models).

    Returns:
        A lower bound where models were measured on the same documents, whose difficulty is part
        of each one's error. NaN where it is not positive, or fewer than 3 models are known.
    """
    paired = values.notna() & errors.notna()
    if paired.sum() < 3 or values[paired].var(ddof=1) == 0:
        return math.nan
    reliability = float(1 - (errors[paired] ** 2).mean() / values[paired].var(ddof=1))
    return reliability if reliability > 0 else math.nan


def corrected_for_attenuation(
    observed: Correlation, reliability_x: float, reliability_y: float
) -> Corrected:
    """Estimate the correlation that there would be without the noise of the documents.

    The interval is stretched by the same factor and cut at ±1; the reliabilities' own uncertainty
    is not part of it.

    Returns:
        The corrected correlation, or the ``reason`` why there is none: a reliability that is not
        estimable or small, or a quotient beyond ±1. It has no interval where ``observed`` has
        none, for the same reason.
    """
    result = Corrected(
        observed=observed.coefficient, reliability_x=reliability_x, reliability_y=reliability_y
    )
    if math.isnan(observed.coefficient):
        return result.with_reason(observed.reason)
    for name, value in (("x", reliability_x), ("y", reliability_y)):
        if not value >= _LEAST:
            problem = f"is {value:.2f}, less than {_LEAST}"
            if math.isnan(value) or value <= 0:
                problem = "is not estimable"
            return result.with_reason(f"the reliability of {name} {problem}")
    factor = 1 / math.sqrt(min(reliability_x, 1.0) * min(reliability_y, 1.0))
    coefficient = factor * observed.coefficient
    if abs(coefficient) > 1:
        return result.with_reason(
            f"the correlation is larger than its reliabilities of {reliability_x:.2f} and "
            f"{reliability_y:.2f} allow"
        )
    # Not `min` and `max`: they would make 1 of NaN.
    low, high = np.clip([factor * observed.low, factor * observed.high], -1.0, 1.0).tolist()
    return dataclasses.replace(
        result, coefficient=coefficient, low=low, high=high, reason=observed.reason
    )
