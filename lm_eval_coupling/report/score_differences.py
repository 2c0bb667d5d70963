"""Paired differences of lm-eval's scores between two runs, document by document."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lm_eval_coupling.report.overview_rows import paired_difference
from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.task_rows import is_score


def score_difference(
    run: SavedRun, base: SavedRun, task: str, problems: list[str]
) -> dict[str, Any]:
    """Compare the scores of two runs over the documents that both logged (``--log_samples``).

    The metric is the first that lm-eval lists for both.

    Args:
        run: the run in question.
        base: the run that it is compared with.
        task: a task of both.
        problems: sentences on samples that are not whole are added.

    Returns:
        ``metric, score`` and ``base_score`` (means over the paired documents), the columns of
        :func:`paired_difference` with the prefix ``score_``, and ``mcnemar_p``; empty if the runs
        share no scored document.
    """
    metrics, base_metrics = (
        [name for name in of.results.get("results", {}).get(task, {}) if is_score(name)]
        for of in (run, base)
    )
    metric = next((name for name in metrics if name in base_metrics), None)
    if metric is None:
        return {}
    own, other = (_document_scores(of, task, metric, problems) for of in (run, base))
    both = pd.concat([own, other], axis=1, join="inner").dropna()
    if both.empty:
        return {}
    own, other = both.iloc[:, 0], both.iloc[:, 1]
    differences = {f"score_{name}": v for name, v in paired_difference(own, other).items()}
    return (
        {"metric": metric, "score": own.mean(), "base_score": other.mean()}
        | differences
        | {"mcnemar_p": mcnemar_p(own, other)}
    )


def _document_scores(run: SavedRun, task: str, metric: str, problems: list[str]) -> pd.Series:
    answers = answers_of_run(run, task, metric, problems)
    scores = {key: answer["scores"].get(metric) for key, answer in answers.items()}
    return pd.Series(scores, dtype=float)


def mcnemar_p(first: pd.Series, second: pd.Series) -> float:
    """Return the p-value of McNemar's exact test of paired scores of 0 and 1.

    Only documents with different scores count. NaN if a score is neither 0 nor 1.
    """
    if not (first.isin([0, 1]) & second.isin([0, 1])).all():
        return math.nan
    higher, lower = int((first > second).sum()), int((first < second).sum())
    if higher == lower:
        return 1.0
    # Imported here, because most commands need no p-value.
    from scipy import special

    return float(2 * special.bdtr(min(higher, lower), higher + lower, 0.5))
