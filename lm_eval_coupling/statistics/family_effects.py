"""A predictor's coefficient where models come in families."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Result,
    complete_rows,
    design,
    load_statsmodels,
)
from lm_eval_coupling.statistics.nested_regression import undetermined
from lm_eval_coupling.statistics.resampling import FEW_FAMILIES

# Variance between families over variance within, from none to all of it.
_RATIOS = np.concatenate([[0.0], np.logspace(-6, 9, 91)])


@dataclasses.dataclass(frozen=True)
class FamilyEffect(Result):
    """A predictor's coefficient where models come in families.

    ``family_share`` is the share of the residual variance that lies between families. ``df`` are
    the degrees of freedom of Student's t.
    """

    method: str
    predictor: str
    effect: Estimate = Estimate()
    p: float = math.nan
    family_share: float = math.nan
    families: int = 0
    n: int = 0
    dropped: int = 0
    confidence: float = CONFIDENCE
    reason: str | None = None
    notes: tuple[str, ...] = ()
    df: float = math.nan


class _Coefficient(NamedTuple):
    value: float
    stderr: float
    df: float
    family_share: float = math.nan


def family_effect(
    frame: pd.DataFrame,
    *,
    score: str,
    predictor: str,
    family: str,
    covariates: Sequence[str] = (),
    method: Literal["mixed", "cluster"] = "mixed",
) -> FamilyEffect:
    """Estimate the coefficient of ``predictor`` when models of a family resemble each other.

    ``mixed`` gives every family its own random level: the maximum of the restricted likelihood
    over the ratio of the variances, and Student's t with Satterthwaite's degrees of freedom.
    ``cluster`` is least squares with the error of Bell and McCaffrey (2002; CR2), which allows
    for any dependence within a family, with Satterthwaite's degrees of freedom too.

    Args:
        frame: One row per model.
        score: Column to predict.
        predictor: Column in question.
        family: Column of families.
        covariates: Columns that are held fixed.
        method: ``mixed`` or ``cluster``.

    Returns:
        The coefficient with its interval and p, or the ``reason`` why there is none.

    Raises:
        CouplingError: If a column is missing, named twice or not numeric, the method is unknown,
            or there is no statsmodels.
    """
    if method not in ("mixed", "cluster"):
        raise CouplingError(f"got method={method!r}, expected 'mixed' or 'cluster'")
    load_statsmodels("api")  # the extra is asked for before the data, so that the error is stable
    rows, dropped = complete_rows(frame, [score, predictor, *covariates], [family])
    groups, labels = pd.factorize(rows[family])
    result = FamilyEffect(method, predictor, families=len(labels), n=len(rows), dropped=dropped)
    reason = undetermined(rows, score, [*covariates, predictor])
    if reason is None and len(labels) < 3:
        reason = f"{len(labels)} families, at least 3 are needed"
    if reason is None and len(labels) == len(rows):
        reason = "every family has one model only: use nested_models"
    if reason:
        return result.with_reason(reason)
    X = design(rows, [*covariates, predictor])
    y = rows[score].to_numpy()
    # Standardized, because columns of very different size lose digits; scaled back below.
    scale, unit = X[:, 1:].std(axis=0), y.std()
    X = np.column_stack([X[:, :1], (X[:, 1:] - X[:, 1:].mean(axis=0)) / scale])
    y = (y - y.mean()) / unit
    estimate = _clustered if method == "cluster" else _mixed
    coefficient = estimate(y, X, groups)
    value, stderr = (v * unit / scale[-1] for v in (coefficient.value, coefficient.stderr))
    if not 0 < stderr < math.inf:
        return result.with_reason("the residuals leave no variance")
    df, share = coefficient.df, coefficient.family_share
    notes = []
    if len(labels) < FEW_FAMILIES:
        notes.append(f"{len(labels)} families are few")
    if share < 1e-3:
        notes.append(
            "no variance between families was detected, so that this is close to plain least "
            "squares"
        )
    return dataclasses.replace(
        result,
        effect=Estimate.from_t(value, stderr, df),
        p=float(2 * stats.t.sf(abs(value / stderr), df)),
        family_share=share,
        notes=tuple(notes),
        df=df,
    )


def _clustered(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> _Coefficient:
    """Return the last coefficient with its CR2 error and Satterthwaite's degrees of freedom."""
    bread = np.linalg.inv(X.T @ X)
    kept = np.eye(len(y)) - X @ bread @ X.T  # what least squares leaves of each observation
    weights = []
    for group in np.unique(groups):
        own = groups == group
        values, vectors = np.linalg.eigh(kept[np.ix_(own, own)])
        # A family that alone determines a coefficient leaves eigenvalues of 0 (Moore-Penrose).
        roots = np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-10)), 0.0)
        adjusted = (vectors * roots) @ vectors.T
        weights.append(bread[-1] @ X[own].T @ adjusted @ kept[own])
    rows = np.array(weights)  # of each family, what it adds to the error, per observation
    products = rows @ rows.T
    df = float(np.trace(products) ** 2 / np.sum(products**2))
    stderr = math.sqrt(float(np.sum((rows @ y) ** 2)))
    return _Coefficient(float(bread[-1] @ X.T @ y), stderr, df)


def _mixed(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> _Coefficient:
    """Return the last coefficient at the maximum of the restricted likelihood.

    The likelihood is profiled over the ratio of the variances. It may have a maximum at 0 and
    another far from it, so that a search from one start misses the higher one.
    """
    n, k = X.shape
    sizes = np.bincount(groups).astype(float)
    sums = np.array([np.bincount(groups, column) for column in X.T]).T
    sums_y = np.bincount(groups, y)

    def profile(ratio: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Return −2 log likelihood, the coefficients and their covariance."""
        shrunk = (ratio / (1 + ratio * sizes))[:, None]
        information = X.T @ X - (sums * shrunk).T @ sums
        inverse = np.linalg.inv(information)
        beta = inverse @ (X.T @ y - sums.T @ (shrunk[:, 0] * sums_y))
        residual = y - X @ beta
        by_family = np.bincount(groups, residual)
        squares = max(residual @ residual - shrunk[:, 0] @ by_family**2, 1e-20 * n)
        variance = squares / (n - k)
        determinants = np.log1p(ratio * sizes).sum() + np.linalg.slogdet(information)[1]
        return (n - k) * math.log(variance) + determinants, beta, variance * inverse

    deviances = [profile(ratio)[0] for ratio in _RATIOS]
    at = int(np.argmin(deviances))
    ratio = _RATIOS[at]
    if 0 < at < len(_RATIOS) - 1:
        bounds = np.log(np.maximum(_RATIOS[[at - 1, at + 1]], 1e-7))
        finer = optimize.minimize_scalar(
            lambda log: profile(math.exp(log))[0], bounds=bounds, method="bounded",
            options={"xatol": 1e-6},
        )  # fmt: skip
        ratio = math.exp(finer.x)
    _, beta, covariance = profile(ratio)
    share = float(ratio / (1 + ratio))
    if np.var(y - X @ beta) < 1e-18:
        return _Coefficient(math.nan, math.nan, math.nan)
    df = _satterthwaite(X, groups, ratio)
    return _Coefficient(float(beta[-1]), math.sqrt(covariance[-1, -1]), df, share)


def _satterthwaite(X: np.ndarray, groups: np.ndarray, ratio: float) -> float:
    """Return Satterthwaite's degrees of freedom of the last coefficient's error.

    They lie between what the families and what the models within families leave, by how much of
    the error comes from the variance of each; the spread of both variances is that of the
    restricted likelihood.
    """
    parts = (np.eye(len(X)), (groups[:, None] == groups).astype(float))
    inverse = np.linalg.inv(parts[0] + ratio * parts[1])
    weighted = X.T @ inverse
    unscaled = np.linalg.inv(weighted @ X)
    projection = inverse - weighted.T @ unscaled @ weighted
    products = [projection @ part for part in parts]
    information = [[float(np.sum(a * b.T)) / 2 for b in products] for a in products]
    direction = weighted.T @ unscaled[:, -1]
    gradient = np.array([direction @ part @ direction for part in parts])
    # In units of the variance within families, which cancels.
    spread = float(gradient @ np.linalg.pinv(information) @ gradient)
    return 2 * float(unscaled[-1, -1]) ** 2 / spread
