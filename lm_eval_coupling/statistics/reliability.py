"""Does a number of a model agree with itself between halves of the documents, and what would it say without its noise?"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.statistics.correlations import Correlation
from lm_eval_coupling.statistics.estimates import Result, check_confidence

_LEAST = 0.3  # below this reliability a correlation is not corrected: the quotient would be noise
_WANTED = 0.9


@dataclasses.dataclass(frozen=True)
class Reliability(Result):
    """Share of the variance between models that is not noise of the documents.

    ``split_half``: correlation over models between means over two random halves of the documents, stepped up to all of
    them (Spearman–Brown), averaged over splits. ``alpha``: the same in closed form, the mean over all splits (Cronbach
    1951), with its exact interval for normal errors (Feldt 1965). ``enough``: documents for a reliability of 0.9.
    """

    split_half: float = math.nan
    alpha: float = math.nan
    low: float = math.nan
    high: float = math.nan
    models: int = 0
    documents: int = 0
    enough: float = math.nan
    confidence: float = 0.95
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Corrected(Result):
    """A correlation divided by the square root of both reliabilities, which are taken as known (Spearman 1904)."""

    coefficient: float = math.nan
    low: float = math.nan
    high: float = math.nan
    observed: float = math.nan
    reliability_x: float = math.nan
    reliability_y: float = math.nan
    reason: str | None = None


def document_reliability(
    values: pd.DataFrame, *, splits: int = 200, confidence: float = 0.95, seed: int = 0
) -> Reliability:
    """Reliability of the models' means over the documents that all of them have.

    Args:
        values: a model a row, a document a column; documents that a model lacks are left out for all.
        splits: random halvings.
        confidence: of the interval.
        seed: of the halvings.

    Returns:
        Its estimates with an interval, or a ``reason`` why there are none.
    """
    check_confidence(confidence)
    X = values.dropna(axis=1).to_numpy(np.float64)
    models, documents = X.shape
    found = Reliability(models=models, documents=documents, confidence=confidence)
    if models < 3 or documents < 2:
        return dataclasses.replace(
            found,
            reason=f"{models} models have {documents} documents in common, at least 3 and 2 are needed",
        )
    between = documents * X.mean(axis=1).var(ddof=1)
    residual = X - X.mean(axis=1, keepdims=True) - X.mean(axis=0, keepdims=True) + X.mean()
    df = (models - 1) * (documents - 1)
    within = (residual**2).sum() / df
    if between <= 1e-24 * np.abs(X).max() ** 2:
        return dataclasses.replace(found, reason="the models do not differ")
    alpha = 1 - within / between
    bounds = stats.f.ppf([(1 + confidence) / 2, (1 - confidence) / 2], models - 1, df)
    low, high = (1 - (1 - alpha) * bound for bound in bounds)
    single = alpha / (
        documents - (documents - 1) * alpha
    )  # of one document, Spearman–Brown backwards
    enough = (
        math.ceil(_WANTED * (1 - single) / (single * (1 - _WANTED))) if 0 < single < 1 else math.nan
    )
    halves = _split_half(X, splits, np.random.default_rng(seed))
    return dataclasses.replace(
        found, split_half=halves, alpha=alpha, low=low, high=high, enough=float(enough)
    )


def _split_half(X: np.ndarray, splits: int, rng: np.random.Generator) -> float:
    """Mean over random halvings of 2r/(1 + r); where a half does not vary there is no agreement to be seen."""
    found = []
    for _ in range(splits):
        order = rng.permutation(X.shape[1])
        half = len(order) // 2
        first, second = X[:, order[:half]].mean(axis=1), X[:, order[half : 2 * half]].mean(axis=1)
        if np.ptp(first) > 0 and np.ptp(second) > 0:
            r = np.corrcoef(first, second)[0, 1]
            found.append(2 * r / (1 + r) if r > -1 else -math.inf)
    # The median: of few models r comes near −1, where the formula has no bound.
    return float(np.median(found)) if found else math.nan


def reliability_from_errors(values: pd.Series, errors: pd.Series) -> float:
    """1 − (mean squared standard error) / (variance between models), at least 0; NaN where either is not known.

    Returns:
        A lower bound where models were measured on the same documents, whose difficulty is part of each one's error.
    """
    known = values.notna() & errors.notna()
    if known.sum() < 3 or values[known].var(ddof=1) == 0:
        return math.nan
    return max(0.0, float(1 - (errors[known] ** 2).mean() / values[known].var(ddof=1)))


def corrected_for_attenuation(
    found: Correlation, reliability_x: float, reliability_y: float
) -> Corrected:
    """The correlation that there would be without the noise of the documents, its interval stretched by the same factor.

    Returns:
        Values beyond ±1 are cut off. The reliabilities' own uncertainty is not part of the interval.
    """
    made = Corrected(
        observed=found.coefficient, reliability_x=reliability_x, reliability_y=reliability_y
    )
    if math.isnan(found.coefficient):
        return dataclasses.replace(made, reason=found.reason)
    for name, value in (("x", reliability_x), ("y", reliability_y)):
        if not value >= _LEAST:
            why = "is not known" if math.isnan(value) else f"is {value:.2f}, less than {_LEAST}"
            return dataclasses.replace(made, reason=f"the reliability of {name} {why}")
    factor = 1 / math.sqrt(min(reliability_x, 1.0) * min(reliability_y, 1.0))
    coefficient, low, high = (
        max(-1.0, min(1.0, factor * v)) for v in (found.coefficient, found.low, found.high)
    )
    return dataclasses.replace(made, coefficient=coefficient, low=low, high=high)
