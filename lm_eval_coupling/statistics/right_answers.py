"""Right and wrong answers of one model against a number of their documents."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import optimize, stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Result,
    Values,
    complete,
    complete_rows,
    is_constant,
    load_statsmodels,
)

FEW_ANSWERS = 30  # of each kind; from fewer no conclusion is drawn


@dataclasses.dataclass(frozen=True)
class Auroc(Result):
    """The probability that a right answer has the higher value than a wrong one.

    Ties count half, and 0.5 is chance. ``tasks`` and ``models`` count those that are pooled.
    """

    auroc: float = math.nan
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    right: int = 0
    wrong: int = 0
    dropped: int = 0
    tasks: int = 1
    confidence: float = CONFIDENCE
    reason: str | None = None
    models: int = 1


@dataclasses.dataclass(frozen=True)
class LogisticEffect(Result):
    """The factor by which one standard deviation of ``predictor`` multiplies the odds.

    The odds are those of a right answer. ``p`` is the likelihood ratio's, or Wald's with
    clusters. ``deviance_explained`` is the predictor's share of the deviance that the controls
    leave. ``rarer`` counts the answers of the rarer kind, and ``models`` the pooled models.
    """

    predictor: str
    controls: tuple[str, ...]
    odds_ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    log_odds: Estimate = Estimate()
    p: float = math.nan
    deviance_explained: float = math.nan
    tasks: int = 1
    n: int = 0
    dropped: int = 0
    confidence: float = CONFIDENCE
    reason: str | None = None
    notes: tuple[str, ...] = ()
    models: int = 1
    rarer: int = 0


def auroc(value: Values, correct: Values) -> Auroc:
    """Estimate the area under the ROC curve with DeLong's variance.

    The interval and p are the normal ones on the scale of log odds.

    Returns:
        The area, 0.5 at chance, or the ``reason`` why there is none.

    Raises:
        CouplingError: If the columns differ in length, or ``correct`` holds other numbers than 0
            and 1.
    """
    columns, dropped = complete(value=value, correct=correct)
    right, wrong = right_and_wrong(columns["value"], columns["correct"])
    result = Auroc(right=len(right), wrong=len(wrong), dropped=dropped)
    if min(len(right), len(wrong)) < 2:
        return result.with_reason(
            f"{len(right)} right and {len(wrong)} wrong answers, 2 of each are needed"
        )
    above, below = placements(right, wrong)
    variance = above.var(ddof=1) / len(right) + below.var(ddof=1) / len(wrong)
    return with_interval(dataclasses.replace(result, auroc=float(above.mean())), float(variance))


def auroc_within(
    frame: pd.DataFrame, value: str, correct: str, task: str
) -> tuple[dict[str, Auroc], Auroc]:
    """Estimate the AUROC of every task, and that of all pairs within a task.

    No document is compared with one of another task.

    Returns:
        The areas by task, and the pooled one. Tasks with fewer than 2 right or 2 wrong answers
        have a ``reason``, and their documents count as dropped in the pool.

    Raises:
        CouplingError: If a column is missing or not numeric, or ``correct`` holds other numbers
            than 0 and 1.
    """
    rows, dropped = complete_rows(frame, [value, correct], [task])
    by_task = {
        str(name): auroc(group[value], group[correct])
        for name, group in rows.groupby(task, sort=True)
    }
    used = [area for area in by_task.values() if not math.isnan(area.auroc)]
    unused = [area for area in by_task.values() if math.isnan(area.auroc)]
    pooled = Auroc(
        right=sum(area.right for area in used),
        wrong=sum(area.wrong for area in used),
        dropped=dropped + sum(area.right + area.wrong for area in unused),
        tasks=len(used),
    )
    if not used:
        return by_task, pooled.with_reason("no task has 2 right and 2 wrong answers")
    pairs = np.array([area.right * area.wrong for area in used], dtype=np.float64)
    weights = pairs / pairs.sum()
    area = float(weights @ [area.auroc for area in used])
    variance = float(weights**2 @ np.square([area.stderr for area in used]))
    return by_task, with_interval(dataclasses.replace(pooled, auroc=area), variance)


def logistic_effect(
    frame: pd.DataFrame,
    *,
    correct: str,
    predictor: str,
    controls: Sequence[str] = (),
    task: str | None = None,
    cluster: str | None = None,
) -> LogisticEffect:
    """Fit a logistic regression of right answers on ``predictor`` and ``controls``.

    Args:
        frame: One row per answer. Rows with a missing value are left out and counted as dropped.
        correct: Column of 0 (wrong) and 1 (right).
        predictor: Column in question; the effect is per standard deviation of it.
        controls: Columns held fixed, such as prompt length; they enter as linear terms.
        task: Column of tasks, each of which gets its own intercept. Tasks answered all right or all
            wrong are left out, and their answers are counted as dropped.
        cluster: Column of labels. Answers with the same label may depend on each other; standard
            error, interval and p then allow for it.

    Returns:
        The odds ratio with its interval and p, or the ``reason`` why there is none.

    Raises:
        CouplingError: If a column is missing or not numeric, ``correct`` holds other numbers than
            0 and 1, or there is no statsmodels.
    """
    load_statsmodels("api")
    labels = [name for name in (task, cluster) if name]
    rows, dropped = complete_rows(frame, [correct, predictor, *controls], labels)
    right_and_wrong(rows[predictor].to_numpy(), rows[correct].to_numpy())
    if task:
        mixed = rows.groupby(task)[correct].transform("nunique") > 1
        rows, dropped = rows[mixed], dropped + int((~mixed).sum())
    n, tasks = len(rows), int(rows[task].nunique()) if task else 1
    y, columns = rows[correct].to_numpy(), rows[[*controls, predictor]]
    rarer = int(min(y.sum(), n - y.sum()))
    result = LogisticEffect(
        predictor, tuple(controls), tasks=tasks, n=n, dropped=dropped, rarer=rarer
    )
    levels = pd.get_dummies(rows[task], dtype=float).to_numpy() if task else np.ones((n, 1))
    if reason := _undetermined(y, columns, levels.shape[1]):
        return result.with_reason(reason)
    X = np.column_stack([levels, (columns - columns.mean()) / columns.std()])
    if np.linalg.matrix_rank(X) < X.shape[1]:
        return result.with_reason("the predictors determine each other exactly")
    if _are_separated(X, y):
        return result.with_reason(
            "the predictors separate right from wrong answers perfectly, so that no odds ratio is "
            "finite"
        )
    groups = pd.factorize(rows[cluster])[0] if cluster else None
    if groups is not None and groups.max() == 0:
        return result.with_reason("all answers are of one cluster, at least 2 are needed")
    return _fit_odds(y, X, groups, result)


def _fit_odds(
    y: np.ndarray, X: np.ndarray, groups: np.ndarray | None, result: LogisticEffect
) -> LogisticEffect:
    """Fit the odds with and without the last column; ``groups`` number clusters, by row."""
    logit = load_statsmodels("api").Logit
    robust = {}
    if groups is not None:
        robust = {"cov_type": "cluster", "cov_kwds": {"groups": groups}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence is checked below
        with_, without = (
            logit(y, design).fit(disp=False, maxiter=200, **robust) for design in (X, X[:, :-1])
        )
    if not (with_.mle_retvals["converged"] and without.mle_retvals["converged"]):
        return result.with_reason("the fit did not settle")
    effect = Estimate.from_t(with_.params[-1], with_.bse[-1], math.inf)
    ratio = max(0.0, 2 * (with_.llf - without.llf))
    notes: tuple[str, ...] = ()
    if result.rarer < 10 * X.shape[1]:
        notes = (
            "fewer than 10 answers of the rarer kind for each coefficient: the effect is "
            "overstated",
        )
    return dataclasses.replace(
        result,
        odds_ratio=math.exp(effect.value),
        low=math.exp(effect.low),
        high=math.exp(effect.high),
        log_odds=effect,
        p=float(stats.chi2.sf(ratio, 1) if groups is None else with_.pvalues[-1]),
        deviance_explained=float(ratio / (-2 * without.llf)),
        notes=notes,
    )


def accuracy_by_bin(value: Values, correct: Values, *, bins: int = 10) -> pd.DataFrame:
    """Return the share of right answers in bins of equal numbers of documents.

    Returns:
        Columns ``bin_low, bin_high, n, mean, accuracy, low, high``, the last two of Wilson's
        interval; ties may make fewer bins.

    Raises:
        CouplingError: If the columns differ in length, ``correct`` holds other numbers than 0 and
            1, or bins < 1.
    """
    if bins < 1:
        raise CouplingError(f"got bins={bins}, expected at least 1")
    columns, _ = complete(value=value, correct=correct)
    right_and_wrong(columns["value"], columns["correct"])
    names = ["bin_low", "bin_high", "n", "mean", "accuracy", "low", "high"]
    if not len(columns["value"]):
        return pd.DataFrame(columns=names)
    frame = pd.DataFrame(columns)
    edges = np.unique(np.quantile(frame["value"], np.linspace(0, 1, bins + 1)))
    bin_of = np.searchsorted(edges, frame["value"], side="right") - 1
    rows = []
    for index, group in frame.groupby(np.clip(bin_of, 0, max(0, len(edges) - 2))):
        right, n = int(group["correct"].sum()), len(group)
        interval = stats.binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
        low, high = edges[index], edges[min(index + 1, len(edges) - 1)]
        rows.append((low, high, n, group["value"].mean(), right / n, interval.low, interval.high))
    return pd.DataFrame(rows, columns=names)


def placements(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place each answer among those of the other kind (DeLong et al. 1988; Sun and Xu 2014).

    Returns:
        For each right answer the share of wrong ones below it, and for each wrong one the share
        of right ones above it; ties count half.
    """
    m, n = len(right), len(wrong)
    ranks = stats.rankdata(np.concatenate([right, wrong]))
    return (ranks[:m] - stats.rankdata(right)) / n, 1 - (ranks[m:] - stats.rankdata(wrong)) / m


def with_interval(result: Auroc, variance: float) -> Auroc:
    """Return the area with its standard error, interval and p, on the scale of log odds."""
    area = result.auroc
    if variance <= 0 or not 0 < area < 1:
        reason = "all answers have the same value"
        if area in (0, 1):
            reason = "right and wrong answers are separated perfectly"
        return dataclasses.replace(result, stderr=0.0, reason=f"no interval, as {reason}")
    stderr = math.sqrt(variance) / (area * (1 - area))
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * stderr
    center = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-(center + sign * half))) for sign in (-1, 1))
    p = float(2 * stats.norm.sf(abs(center) / stderr))
    return dataclasses.replace(result, stderr=math.sqrt(variance), low=low, high=high, p=p)


def right_and_wrong(value: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of right and of wrong answers.

    Raises:
        CouplingError: If ``correct`` holds other numbers than 0 and 1.
    """
    if not np.isin(correct, (0, 1)).all():
        other = correct[~np.isin(correct, (0, 1))][0]
        raise CouplingError(
            f"got {other:g} as correct, expected 0 (wrong) or 1 (right) for every document"
        )
    return value[correct == 1], value[correct == 0]


def _undetermined(y: np.ndarray, columns: pd.DataFrame, levels: int) -> str | None:
    if len(y) < levels + columns.shape[1] + 2 or len(np.unique(y)) < 2:
        return f"{len(y)} documents, {int(y.sum())} answered right, are too few"
    constants = (f"{name} is constant" for name in columns if is_constant(columns[name].to_numpy()))
    return next(constants, None)


def _are_separated(X: np.ndarray, y: np.ndarray) -> bool:
    """Return whether a hyperplane parts right from wrong answers, ties on it allowed.

    Then the likelihood has no maximum (Albert and Anderson 1984; as a linear program: Konis
    2007).
    """
    sided = X * np.where(y == 1, 1.0, -1.0)[:, None]
    best = optimize.linprog(-sided.sum(axis=0), A_ub=-sided, b_ub=np.zeros(len(y)), bounds=(-1, 1))
    return best.status == 0 and bool(-best.fun > 1e-7 * np.abs(sided).sum())
