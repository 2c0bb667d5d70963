"""Within one model, over documents: do documents of higher coupling get answered better?"""

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
    Estimate,
    Result,
    Values,
    check_confidence,
    complete,
    complete_rows,
    constant,
    statsmodels,
)


@dataclasses.dataclass(frozen=True)
class Auroc(Result):
    """The probability that a right answer has the higher value than a wrong one (ties count half); 0.5 is chance.

    ``tasks``, ``models``: over how many it is pooled, or 1.
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
    confidence: float = 0.95
    reason: str | None = None
    models: int = 1


@dataclasses.dataclass(frozen=True)
class LogisticEffect(Result):
    """By what factor one standard deviation of ``predictor`` multiplies the odds of a right answer.

    ``p``: of the likelihood ratio (Wald's where there are clusters); ``deviance_explained``: the predictor's share of the
    deviance left by the controls; ``models``: how many there are together.
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
    confidence: float = 0.95
    reason: str | None = None
    notes: tuple[str, ...] = ()
    models: int = 1


def auroc(value: Values, correct: Values, *, confidence: float = 0.95) -> Auroc:
    """Area under the ROC curve with DeLong's variance, the interval on the scale of log odds; p of Mann and Whitney.

    Returns:
        The area, 0.5 at chance, or a ``reason`` why there is none.

    Raises:
        CouplingError: if the columns differ in length, or ``correct`` holds other numbers than 0 and 1.
    """
    check_confidence(confidence)
    columns, dropped = complete(value=value, correct=correct)
    right, wrong = _right_and_wrong(columns["value"], columns["correct"])
    found = Auroc(right=len(right), wrong=len(wrong), dropped=dropped, confidence=confidence)
    if min(len(right), len(wrong)) < 2:
        return dataclasses.replace(
            found, reason=f"{len(right)} right and {len(wrong)} wrong answers, 2 of each are needed"
        )
    area, variance = _delong(right, wrong)
    p = float(stats.mannwhitneyu(right, wrong).pvalue)
    return with_interval(dataclasses.replace(found, auroc=area, p=p), variance)


def auroc_within(
    frame: pd.DataFrame, value: str, correct: str, task: str, *, confidence: float = 0.95
) -> tuple[dict[str, Auroc], Auroc]:
    """The AUROC of every task, and that of all pairs within a task (no document is compared across tasks).

    Returns:
        Tasks with fewer than 2 right or 2 wrong answers have a ``reason``, and their documents count as dropped in the pool.

    Raises:
        CouplingError: if a column is missing or not numeric, or ``correct`` holds other numbers than 0 and 1.
    """
    rows, dropped = complete_rows(frame, [value, correct], [task])
    by_task = {
        str(name): auroc(group[value], group[correct], confidence=confidence)
        for name, group in rows.groupby(task, sort=True)
    }
    used = [found for found in by_task.values() if not math.isnan(found.auroc)]
    dropped += sum(
        found.right + found.wrong for found in by_task.values() if math.isnan(found.auroc)
    )
    pooled = Auroc(
        right=sum(f.right for f in used),
        wrong=sum(f.wrong for f in used),
        dropped=dropped,
        tasks=len(used),
        confidence=confidence,
    )
    if not used:
        return by_task, dataclasses.replace(
            pooled, reason="no task has 2 right and 2 wrong answers"
        )
    pairs = np.array([f.right * f.wrong for f in used], dtype=np.float64)
    weights = pairs / pairs.sum()
    area = float(weights @ [f.auroc for f in used])
    variance = float(weights**2 @ np.square([f.stderr for f in used]))
    pooled = with_interval(dataclasses.replace(pooled, auroc=area), variance)
    # Under the null a task's U has variance pairs·(n + 1)/12 (van Elteren's test with these weights; ties ignored).
    null = sum(
        w**2 * (f.right + f.wrong + 1) / (12 * f.right * f.wrong)
        for w, f in zip(weights, used, strict=True)
    )
    return by_task, dataclasses.replace(
        pooled, p=float(2 * stats.norm.sf(abs(area - 0.5) / math.sqrt(null)))
    )


def logistic_effect(
    frame: pd.DataFrame,
    *,
    correct: str,
    predictor: str,
    controls: Sequence[str] = (),
    task: str | None = None,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> LogisticEffect:
    """Logistic regression of right answers on ``predictor``, with controls such as prompt length and confidence.

    With ``task`` every task has its own level of difficulty; tasks answered all right or all wrong say nothing and their
    documents are dropped and counted. The interval is Wald's, per standard deviation of the predictor; with ``cluster``
    rows of one cluster need not be independent (robust error, and ``p`` is Wald's as well).

    Returns:
        The odds ratio with its interval and p, or a ``reason`` why there is none.

    Raises:
        CouplingError: if a column is missing or not numeric, ``correct`` holds other numbers than 0 and 1, or there is no
            statsmodels.
    """
    check_confidence(confidence)
    sm = statsmodels("api")
    rows, dropped = complete_rows(
        frame, [correct, predictor, *controls], [name for name in (task, cluster) if name]
    )
    _right_and_wrong(rows[predictor].to_numpy(), rows[correct].to_numpy())
    if task:
        mixed = rows.groupby(task)[correct].transform("nunique") > 1
        rows, dropped = rows[mixed], dropped + int((~mixed).sum())
    n, tasks = len(rows), int(rows[task].nunique()) if task else 1
    found = LogisticEffect(
        predictor, tuple(controls), tasks=tasks, n=n, dropped=dropped, confidence=confidence
    )
    y, columns = rows[correct].to_numpy(), rows[[*controls, predictor]]
    levels = pd.get_dummies(rows[task], dtype=float).to_numpy() if task else np.ones((n, 1))
    if n < levels.shape[1] + columns.shape[1] + 2 or len(np.unique(y)) < 2:
        return dataclasses.replace(
            found, reason=f"{n} documents, {int(y.sum())} answered right, are too few"
        )
    for name in columns:
        if constant(columns[name].to_numpy()):
            return dataclasses.replace(found, reason=f"{name} is constant")
    X = np.column_stack([levels, (columns - columns.mean()) / columns.std()])
    if np.linalg.matrix_rank(X) < X.shape[1]:
        return dataclasses.replace(found, reason="the predictors determine each other exactly")
    if _separated(X, y):
        return dataclasses.replace(
            found,
            reason="the predictors separate right from wrong answers perfectly, so that no odds ratio is finite",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which is asked for below
        robust = (
            {"cov_type": "cluster", "cov_kwds": {"groups": pd.factorize(rows[cluster])[0]}}
            if cluster
            else {}
        )
        with_, without = (
            sm.Logit(y, design).fit(disp=False, maxiter=200, **robust) for design in (X, X[:, :-1])
        )
    if not (with_.mle_retvals["converged"] and without.mle_retvals["converged"]):
        return dataclasses.replace(found, reason="the fit did not settle")
    effect = Estimate.from_t(with_.params[-1], with_.bse[-1], math.inf, confidence)
    ratio = max(0.0, 2 * (with_.llf - without.llf))
    few = min(y.sum(), n - y.sum()) < 10 * X.shape[1]
    return dataclasses.replace(
        found,
        odds_ratio=math.exp(effect.value),
        low=math.exp(effect.low),
        high=math.exp(effect.high),
        log_odds=effect,
        p=float(with_.pvalues[-1] if cluster else stats.chi2.sf(ratio, 1)),
        deviance_explained=float(ratio / (-2 * without.llf)),
        notes=(
            "fewer than 10 answers of the rarer kind for each coefficient: the effect is overstated",
        )
        if few
        else (),
    )


def accuracy_by_bin(
    value: Values, correct: Values, *, bins: int = 10, confidence: float = 0.95
) -> pd.DataFrame:
    """Share of right answers in bins of equal numbers of documents, as for calibration, with Wilson's interval.

    Returns:
        Columns: ``bin_low, bin_high, n, mean, accuracy, low, high``; ties may make fewer bins.

    Raises:
        CouplingError: if the columns differ in length, ``correct`` holds other numbers than 0 and 1, or bins < 1.
    """
    check_confidence(confidence)
    if bins < 1:
        raise CouplingError(f"got bins={bins}, expected at least 1")
    columns, _ = complete(value=value, correct=correct)
    _right_and_wrong(columns["value"], columns["correct"])
    names = ["bin_low", "bin_high", "n", "mean", "accuracy", "low", "high"]
    if not len(columns["value"]):
        return pd.DataFrame(columns=names)
    frame = pd.DataFrame(columns)
    edges = np.unique(np.quantile(frame["value"], np.linspace(0, 1, bins + 1)))
    which = np.clip(
        np.searchsorted(edges, frame["value"], side="right") - 1, 0, max(0, len(edges) - 2)
    )
    rows = []
    for index, group in frame.groupby(which):
        right, n = int(group["correct"].sum()), len(group)
        interval = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
        low, high = edges[index], edges[min(index + 1, len(edges) - 1)]
        rows.append((low, high, n, group["value"].mean(), right / n, interval.low, interval.high))
    return pd.DataFrame(rows, columns=names)


def _right_and_wrong(value: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not np.isin(correct, (0, 1)).all():
        other = correct[~np.isin(correct, (0, 1))][0]
        raise CouplingError(
            f"got {other:g} as correct, expected 0 (wrong) or 1 (right) for every document"
        )
    return value[correct == 1], value[correct == 0]


def _delong(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """AUROC and its variance (DeLong et al. 1988) from midranks (Sun and Xu 2014)."""
    above, below = placements(right, wrong)
    return float(above.mean()), float(
        above.var(ddof=1) / len(right) + below.var(ddof=1) / len(wrong)
    )


def placements(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each right answer the share of wrong ones below it, of each wrong one the share of right ones above it."""
    m, n = len(right), len(wrong)
    ranks = stats.rankdata(np.concatenate([right, wrong]))
    return (ranks[:m] - stats.rankdata(right)) / n, 1 - (ranks[m:] - stats.rankdata(wrong)) / m


def with_interval(found: Auroc, variance: float) -> Auroc:
    """``found`` with the standard error of this variance and its interval, which is symmetric on the scale of log odds."""
    area = found.auroc
    if variance <= 0 or not 0 < area < 1:
        reason = (
            "right and wrong answers are separated perfectly"
            if area in (0, 1)
            else "all answers have the same value"
        )
        return dataclasses.replace(found, stderr=0.0, reason=f"no interval, as {reason}")
    half = stats.norm.ppf((1 + found.confidence) / 2) * math.sqrt(variance) / (area * (1 - area))
    center = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-(center + sign * half))) for sign in (-1, 1))
    return dataclasses.replace(found, stderr=math.sqrt(variance), low=low, high=high)


def _separated(X: np.ndarray, y: np.ndarray) -> bool:
    """Whether a hyperplane has all right answers on one side and all wrong ones on the other, borders allowed."""
    # Then the likelihood has no maximum (Albert and Anderson 1984; as a linear programme: Konis 2007).
    sided = X * np.where(y == 1, 1.0, -1.0)[:, None]
    best = optimize.linprog(-sided.sum(axis=0), A_ub=-sided, b_ub=np.zeros(len(y)), bounds=(-1, 1))
    return best.status == 0 and bool(-best.fun > 1e-7 * np.abs(sided).sum())
