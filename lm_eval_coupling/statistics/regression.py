"""What coupling adds to what is known of a model anyway: nested regressions, families, collinearity, many tests."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.correlations import Correlation, partial_correlation
from lm_eval_coupling.statistics.estimates import (
    Estimate,
    Result,
    Values,
    check_confidence,
    complete_rows,
    constant,
    statsmodels,
)

_FEW_FAMILIES = 30  # below this, intervals over clusters are known to be too narrow
_VARIANCE_INFLATION = 10.0


@dataclasses.dataclass(frozen=True)
class Model(Result):
    """How well one regression describes, and how well it predicts.

    ``r2_left_out`` (every model predicted from all others) and ``r2_left_out_family`` (from all other families) compare
    squared errors with those of the mean of the same others: 0 is no better than that mean, negative is worse.
    """

    r2: float = math.nan
    adjusted_r2: float = math.nan
    aic: float = math.nan
    bic: float = math.nan
    r2_left_out: float = math.nan
    r2_left_out_family: float = math.nan


@dataclasses.dataclass(frozen=True)
class NestedModels(Result):
    """Regressions of ``score`` on the covariates, without and with ``predictor``.

    ``f`` has 1 and ``df`` degrees of freedom and ``p`` belongs to it; ``effect`` is the predictor's coefficient,
    ``partial`` its correlation with the score at fixed covariates, ``vif`` its variance inflation factor.
    """

    score: str
    predictor: str
    covariates: tuple[str, ...]
    without: Model = Model()
    with_predictor: Model = Model()
    effect: Estimate = Estimate()
    partial: Correlation = Correlation("partial pearson")
    f: float = math.nan
    df: int = 0
    p: float = math.nan
    vif: float = math.nan
    condition_number: float = math.nan
    families: int = 0
    n: int = 0
    dropped: int = 0
    confidence: float = 0.95
    reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FamilyEffect(Result):
    """A predictor's coefficient where models come in families; ``family_share``: of the residual variance, that between."""

    method: str
    predictor: str
    effect: Estimate = Estimate()
    p: float = math.nan
    family_share: float = math.nan
    families: int = 0
    n: int = 0
    dropped: int = 0
    confidence: float = 0.95
    reason: str | None = None
    notes: tuple[str, ...] = ()


def nested_models(
    frame: pd.DataFrame,
    *,
    score: str,
    predictor: str,
    covariates: Sequence[str] = (),
    family: str | None = None,
    confidence: float = 0.95,
) -> NestedModels:
    """Whether ``predictor`` says something of ``score`` that ``covariates`` do not, by least squares over the rows.

    Returns:
        The models without and with it, in the data and left out, and the test between them, or a ``reason`` why there is
        none.

    Raises:
        CouplingError: if a column is missing, named twice or not numeric, or statsmodels is not installed.
    """
    check_confidence(confidence)
    sm = statsmodels("api")
    rows, dropped = complete_rows(
        frame, [score, predictor, *covariates], [family] if family else []
    )
    n, df = len(rows), len(rows) - 2 - len(covariates)
    found = NestedModels(
        score, predictor, tuple(covariates), n=n, df=df, dropped=dropped, confidence=confidence
    )
    if reason := _undetermined(rows, score, [*covariates, predictor]):
        return dataclasses.replace(found, reason=reason)
    y = rows[score].to_numpy()
    designs = [_design(rows, names) for names in (covariates, [*covariates, predictor])]
    without, with_ = (sm.OLS(y, X).fit() for X in designs)
    families = rows[family].to_numpy() if family else None
    test = with_.compare_f_test(without)
    spread = collinearity(rows, [*covariates, predictor])
    vif = float(spread["vif"][predictor])
    count = rows[family].nunique() if family else 0
    notes = (
        []
        if n >= 10 * (len(covariates) + 1)
        else [f"{n} observations for {len(covariates) + 1} predictors are few"]
    )
    if vif > _VARIANCE_INFLATION:
        notes.append(
            f"the covariates explain {_explained(vif)} of {predictor}, so that its own part is hard to tell"
        )
    if 0 < count < n:
        notes.append(f"{n} observations are of {count} families only and were taken as independent")
    return dataclasses.replace(
        found,
        without=_describe(without, y, designs[0], families),
        with_predictor=_describe(with_, y, designs[1], families),
        effect=Estimate.from_t(with_.params[-1], with_.bse[-1], with_.df_resid, confidence),
        partial=partial_correlation(rows, predictor, score, covariates, confidence=confidence),
        f=float(test[0]),
        p=float(test[1]),
        vif=vif,
        condition_number=spread.attrs["condition_number"],
        families=count,
        notes=tuple(notes),
    )


def left_out(score: Values, predictor: Values, family: pd.Series | Sequence[str]) -> Model:
    """How well a straight line over one predictor predicts models, and families, that it was not fitted to.

    Returns:
        r² in the data, and of predictions of what was left out; all NaN where there are too few models.

    Raises:
        CouplingError: if columns differ in length or are not numeric.
    """
    rows, _ = complete_rows(
        pd.DataFrame({"y": score, "x": predictor, "family": family}), ["y", "x"], ["family"]
    )
    y, x = rows["y"].to_numpy(), rows["x"].to_numpy()
    if len(y) < 4 or constant(y) or constant(x):
        return Model()
    X, families = _design(rows, ["x"]), pd.factorize(rows["family"])[0]
    several = 1 < len(set(families)) < len(y)
    return Model(
        r2=float(np.corrcoef(x, y)[0, 1] ** 2),
        r2_left_out=_r2_left_out(y, X, np.arange(len(y))),
        r2_left_out_family=_r2_left_out(y, X, families) if several else math.nan,
    )


def family_effect(
    frame: pd.DataFrame,
    *,
    score: str,
    predictor: str,
    family: str,
    covariates: Sequence[str] = (),
    method: Literal["mixed", "cluster"] = "mixed",
    confidence: float = 0.95,
) -> FamilyEffect:
    """The coefficient of ``predictor`` when models of a family resemble each other.

    ``mixed``: every family has its own random level (REML). ``cluster``: least squares with errors that allow for any
    dependence within a family. Both use Student's t with (families − 1) degrees of freedom, as the normal distribution
    that is usual finds too much in few families; the notes say when they are few.

    Returns:
        The coefficient with its interval and p, or a ``reason`` why there is none.

    Raises:
        CouplingError: if a column is missing, named twice or not numeric, the method is unknown, or there is no statsmodels.
    """
    if method not in ("mixed", "cluster"):
        raise CouplingError(f"got method={method!r}, expected 'mixed' or 'cluster'")
    check_confidence(confidence)
    statsmodels("api")  # which is missed whether or not there are enough models
    rows, dropped = complete_rows(frame, [score, predictor, *covariates], [family])
    groups, labels = pd.factorize(rows[family])
    found = FamilyEffect(
        method, predictor, families=len(labels), n=len(rows), dropped=dropped, confidence=confidence
    )
    reason = _undetermined(rows, score, [*covariates, predictor])
    if reason is None and len(labels) < 3:
        reason = f"{len(labels)} families, at least 3 are needed"
    if reason is None and len(labels) == len(rows):
        reason = "every family has one model only: use nested_models"
    if reason:
        return dataclasses.replace(found, reason=reason)
    y, X = rows[score].to_numpy(), _design(rows, [*covariates, predictor])
    notes = (
        [f"{len(labels)} families are few: the interval may be too narrow"]
        if len(labels) < _FEW_FAMILIES
        else []
    )
    # Standardised, because the optimiser fails on columns of very different size; the coefficient is scaled back.
    scale = np.append(1.0, X[:, 1:].std(axis=0))
    X = np.column_stack([X[:, :1], (X[:, 1:] - X[:, 1:].mean(axis=0)) / scale[1:]])
    unit = y.std()
    value, stderr, share = (_clustered if method == "cluster" else _mixed)(y / unit, X, groups)
    value, stderr = value * unit / scale[-1], stderr * unit / scale[-1]
    if not 0 < stderr < math.inf:
        return dataclasses.replace(found, reason="the fit did not settle")
    if share < 1e-3:
        notes.append(
            "no variance between families was found, so that this is close to plain least squares"
        )
    df = len(labels) - 1
    return dataclasses.replace(
        found,
        effect=Estimate.from_t(value, stderr, df, confidence),
        p=float(2 * stats.t.sf(abs(value / stderr), df)),
        family_share=share,
        notes=tuple(notes),
    )


def _clustered(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """The last coefficient and its error, which allows for any dependence within a group; no share of variance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = statsmodels("api").OLS(y, X).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return float(np.asarray(fit.params)[-1]), float(np.asarray(fit.bse)[-1]), math.nan


def _mixed(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """The last coefficient, its error and the groups' share of the variance; NaN where the fit did not settle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which is asked for below
        try:  # gradients fail at a share of 0
            fit = statsmodels("api").MixedLM(y, X, groups=groups).fit(reml=True, method="powell")
        except np.linalg.LinAlgError:  # residuals that are rounding leave no variance to share
            return math.nan, math.nan, math.nan
    if not fit.converged:
        return math.nan, math.nan, math.nan
    between, size = float(np.asarray(fit.cov_re)[0, 0]), X.shape[1]
    coefficient, error = (float(np.asarray(values)[size - 1]) for values in (fit.params, fit.bse))
    return coefficient, error, between / (between + float(fit.scale))


def collinearity(frame: pd.DataFrame, predictors: Sequence[str]) -> pd.DataFrame:
    """Variance inflation factor of every predictor, with words where it exceeds 10; index: the predictors.

    Returns:
        ``attrs["condition_number"]`` is that of the standardised predictors (1: independent; above 30: hardly separable).

    Raises:
        CouplingError: if a column is missing, named twice or not numeric.
    """
    rows, _ = complete_rows(frame, predictors)
    X = rows.to_numpy()
    if len(X) < 2 or any(constant(column) for column in X.T):
        vif, condition = np.full(len(predictors), math.nan), math.nan
    else:
        scaled = (X - X.mean(axis=0)) / X.std(axis=0)
        variances, directions = np.linalg.eigh(scaled.T @ scaled / len(X))
        fixed = variances <= 1e-12 * variances[-1]  # combinations of predictors that do not vary
        vif = (directions[:, ~fixed] ** 2 / variances[~fixed]).sum(axis=1)
        vif[(np.abs(directions[:, fixed]) > 1e-3).any(axis=1)] = math.inf
        condition = math.inf if fixed.any() else math.sqrt(variances[-1] / variances[0])
    words = [
        ""
        if not v > _VARIANCE_INFLATION
        else f"the other predictors explain {_explained(v)} of {name}"
        for name, v in zip(predictors, vif, strict=True)
    ]
    table = pd.DataFrame({"vif": vif, "note": words}, index=list(predictors))
    table.attrs["condition_number"] = condition
    return table


def adjust_p_values(p: Values, method: Literal["holm", "fdr_bh"] = "holm") -> np.ndarray:
    """p-values of several tests adjusted by Holm or by Benjamini and Hochberg; NaN (no test) stays and does not count.

    Returns:
        As many values, in their order.

    Raises:
        CouplingError: if a value lies outside [0, 1] or the method is unknown.
    """
    if method not in ("holm", "fdr_bh"):
        raise CouplingError(f"got method={method!r}, expected 'holm' or 'fdr_bh'")
    p = np.asarray(p, dtype=np.float64)
    known = ~np.isnan(p)
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise CouplingError(
            f"got p-values from {np.nanmin(p):g} to {np.nanmax(p):g}, expected numbers between 0 and 1"
        )
    adjusted = np.full(p.shape, math.nan)
    if known.any():
        adjusted[known] = (
            _holm(p[known])
            if method == "holm"
            else stats.false_discovery_control(p[known], method="bh")
        )
    return adjusted


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm (1979). Not that of statsmodels, which collects garbage at every call: a quarter of a second each."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _explained(vif: float) -> str:
    """The share of a predictor that gives this variance inflation factor."""
    return "all" if math.isinf(vif) else "more than 99.9%" if vif > 1000 else f"{1 - 1 / vif:.1%}"


def _design(rows: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    return np.column_stack([np.ones(len(rows)), *(rows[name].to_numpy() for name in names)])


def _undetermined(rows: pd.DataFrame, score: str, predictors: Sequence[str]) -> str | None:
    if len(rows) < len(predictors) + 2:
        return f"{len(rows)} complete observations for {len(predictors)} predictors, at least {len(predictors) + 2} are needed"
    for name in (score, *predictors):
        if constant(rows[name].to_numpy()):
            return f"{name} is constant"
    vif = collinearity(rows, predictors)["vif"]
    if np.isinf(vif).any():
        return f"{' and '.join(vif.index[np.isinf(vif)])} determine each other exactly"
    return None


def _describe(fit: Any, y: np.ndarray, X: np.ndarray, families: np.ndarray | None) -> Model:
    return Model(
        r2=float(fit.rsquared),
        adjusted_r2=float(fit.rsquared_adj),
        aic=float(fit.aic),
        bic=float(fit.bic),
        r2_left_out=_r2_left_out(y, X, np.arange(len(y))),
        r2_left_out_family=math.nan
        if families is None
        else _r2_left_out(y, X, pd.factorize(families)[0]),
    )


def _r2_left_out(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> float:
    """1 − (squared errors of predicting every group from the others) / (the same of their mean), via the hat matrix.

    Returns:
        NaN where the others do not determine the regression.
    """
    return 1 - _squared_errors_left_out(y, X, groups) / _squared_errors_left_out(
        y, np.ones((len(y), 1)), groups
    )


def _squared_errors_left_out(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> float:
    basis, _ = np.linalg.qr(X / np.linalg.norm(X, axis=0))
    residual = y - basis @ (basis.T @ y)
    total = 0.0
    for group in np.unique(groups):
        own = groups == group
        kept = np.eye(own.sum()) - basis[own] @ basis[own].T
        if np.linalg.eigvalsh(kept)[0] < 1e-10:
            return math.nan
        total += float(np.sum(np.linalg.solve(kept, residual[own]) ** 2))
    return total
