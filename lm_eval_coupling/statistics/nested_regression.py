"""Nested regressions: what a predictor adds to known covariates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.statistics.correlations import Correlation, partial_correlation
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Result,
    Values,
    complete_rows,
    design,
    is_constant,
    load_statsmodels,
)

_VARIANCE_INFLATION = 10.0


@dataclasses.dataclass(frozen=True)
class Model(Result):
    """Quality of one regression, in the data and in prediction.

    ``r2_left_out`` predicts every model from all others and ``r2_left_out_family`` from all other
    families. Both compare squared errors with those of the mean of the same others: 0 is no
    better than that mean, negative is worse.
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

    ``effect`` is the predictor's coefficient, ``partial`` its correlation with the score at fixed
    covariates, ``vif`` its variance inflation factor. ``p`` is the permutation test of
    ``partial``; ``p_f`` belongs to ``f``, which has 1 and ``df`` degrees of freedom and takes the
    models as independent and normal.
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
    confidence: float = CONFIDENCE
    reason: str | None = None
    notes: tuple[str, ...] = ()
    p_f: float = math.nan


def nested_models(
    frame: pd.DataFrame,
    *,
    score: str,
    predictor: str,
    covariates: Sequence[str] = (),
    family: str | None = None,
    resamples: int = 1999,
) -> NestedModels:
    """Measure what ``predictor`` adds to ``covariates`` in least squares over the rows.

    Args:
        frame: One row per model.
        score: Column to predict.
        predictor: Column in question.
        covariates: Columns that are held fixed.
        family: Column of families, which are permuted and left out as wholes.
        resamples: Number of permutations.

    Returns:
        The regressions without and with the predictor, fitted and left out, and the test between
        them, or the ``reason`` why there is none.

    Raises:
        CouplingError: If a column is missing, named twice or not numeric, or statsmodels is not
            installed.
    """
    sm = load_statsmodels("api")
    predictors = [*covariates, predictor]
    rows, dropped = complete_rows(frame, [score, *predictors], [family] if family else [])
    n, df = len(rows), len(rows) - 1 - len(predictors)
    result = NestedModels(score, predictor, tuple(covariates), n=n, df=df, dropped=dropped)
    if reason := undetermined(rows, score, predictors):
        return result.with_reason(reason)
    y = rows[score].to_numpy()
    designs = [design(rows, names) for names in (covariates, predictors)]
    without, with_ = (sm.OLS(y, X).fit() for X in designs)
    families = rows[family].to_numpy() if family else None
    test = with_.compare_f_test(without)
    spread = collinearity(rows, predictors)
    partial = partial_correlation(
        rows, predictor, score, covariates, family=family, resamples=resamples
    )
    return dataclasses.replace(
        result,
        without=_describe(without, y, designs[0], families),
        with_predictor=_describe(with_, y, designs[1], families),
        effect=Estimate.from_t(with_.params[-1], with_.bse[-1], with_.df_resid),
        partial=partial,
        f=float(test[0]),
        p=partial.p,
        p_f=float(test[1]),
        vif=float(spread["vif"][predictor]),
        condition_number=spread.attrs["condition_number"],
        families=rows[family].nunique() if family else 0,
        notes=tuple(_notes(n, len(predictors), predictor, float(spread["vif"][predictor]))),
    )


def _notes(n: int, predictors: int, predictor: str, vif: float) -> list[str]:
    notes = []
    if n < 10 * predictors:
        notes.append(f"{n} observations for {predictors} predictors are few")
    if vif > _VARIANCE_INFLATION:
        notes.append(
            f"the covariates explain {_explained(vif)} of {predictor}, so that its own part is "
            "hard to tell"
        )
    return notes


def left_out(score: Values, predictor: Values, family: pd.Series | Sequence[str]) -> Model:
    """Measure how well a straight line predicts models, and families, it was not fitted to.

    Returns:
        R² in the data and of predictions of what was left out; all NaN for fewer than 4 models.

    Raises:
        CouplingError: If columns differ in length or are not numeric.
    """
    rows, _ = complete_rows(
        pd.DataFrame({"y": score, "x": predictor, "family": family}), ["y", "x"], ["family"]
    )
    y, x = rows["y"].to_numpy(), rows["x"].to_numpy()
    if len(y) < 4 or is_constant(y) or is_constant(x):
        return Model()
    X, families = design(rows, ["x"]), pd.factorize(rows["family"])[0]
    several = 1 < len(set(families)) < len(y)
    return Model(
        r2=float(np.corrcoef(x, y)[0, 1] ** 2),
        r2_left_out=_r2_left_out(y, X, np.arange(len(y))),
        r2_left_out_family=_r2_left_out(y, X, families) if several else math.nan,
    )


def collinearity(frame: pd.DataFrame, predictors: Sequence[str]) -> pd.DataFrame:
    """Return the variance inflation factor of every predictor, with words where it exceeds 10.

    Returns:
        One row per predictor. ``attrs["condition_number"]`` is that of the standardized
        predictors: 1 if they are independent, above 30 if they are hardly separable.

    Raises:
        CouplingError: If a column is missing, named twice or not numeric.
    """
    rows, _ = complete_rows(frame, predictors)
    X = rows.to_numpy()
    if len(X) < 2 or any(is_constant(column) for column in X.T):
        vif, condition = np.full(len(predictors), math.nan), math.nan
    else:
        scaled = (X - X.mean(axis=0)) / X.std(axis=0)
        variances, directions = np.linalg.eigh(scaled.T @ scaled / len(X))
        fixed = variances <= 1e-12 * variances[-1]  # combinations of predictors that do not vary
        vif = (directions[:, ~fixed] ** 2 / variances[~fixed]).sum(axis=1)
        vif[(np.abs(directions[:, fixed]) > 1e-3).any(axis=1)] = math.inf
        condition = math.inf if fixed.any() else math.sqrt(variances[-1] / variances[0])
    words = [
        f"the other predictors explain {_explained(v)} of {name}" if v > _VARIANCE_INFLATION else ""
        for name, v in zip(predictors, vif, strict=True)
    ]
    table = pd.DataFrame({"vif": vif, "note": words}, index=list(predictors))
    table.attrs["condition_number"] = condition
    return table


def undetermined(rows: pd.DataFrame, score: str, predictors: Sequence[str]) -> str | None:
    """Return the reason why the rows do not determine a regression, or None."""
    least = len(predictors) + 2
    if len(rows) < least:
        return (
            f"{len(rows)} complete observations for {len(predictors)} predictors, "
            f"at least {least} are needed"
        )
    for name in (score, *predictors):
        if is_constant(rows[name].to_numpy()):
            return f"{name} is constant"
    vif = collinearity(rows, predictors)["vif"]
    if np.isinf(vif).any():
        return f"{' and '.join(vif.index[np.isinf(vif)])} determine each other exactly"
    return None


def _explained(vif: float) -> str:
    """Return the share of a predictor that gives this variance inflation factor, in words."""
    return "all" if math.isinf(vif) else "more than 99.9%" if vif > 1000 else f"{1 - 1 / vif:.1%}"


def _describe(fit: Any, y: np.ndarray, X: np.ndarray, families: np.ndarray | None) -> Model:
    by_family = math.nan
    if families is not None:
        by_family = _r2_left_out(y, X, pd.factorize(families)[0])
    return Model(
        r2=float(fit.rsquared),
        adjusted_r2=float(fit.rsquared_adj),
        aic=float(fit.aic),
        bic=float(fit.bic),
        r2_left_out=_r2_left_out(y, X, np.arange(len(y))),
        r2_left_out_family=by_family,
    )


def _r2_left_out(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> float:
    """Return 1 − (squared errors of predicting each group from the others) / (those of their mean).

    NaN where the others do not determine the regression.
    """
    of_mean = _squared_errors_left_out(y, np.ones((len(y), 1)), groups)
    return 1 - _squared_errors_left_out(y, X, groups) / of_mean


def _squared_errors_left_out(y: np.ndarray, X: np.ndarray, groups: np.ndarray) -> float:
    """Sum the squared errors of predicting each group from the others, via the hat matrix."""
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
