"""Coupling of documents against right and wrong answers, within each model.

A row is a measured document: coupling and regularity of its prompts (mean over them), whether the
answer was right, and from lm-eval's samples the model's own ``confidence`` (log-likelihood of its
choice minus that of the runner-up) and ``margin`` (of the right choice minus that of the best
wrong one). Models are also pooled, a document counting once however many of them answered it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.fit.across_models import table
from lm_eval_coupling.fit.losses import margin_of, right_choice
from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.saved_table import passing_over
from lm_eval_coupling.saved.values import means_of_parts, prompt_values, value_names
from lm_eval_coupling.statistics import (
    Auroc,
    Correlation,
    LogisticEffect,
    accuracy_by_bin,
    adjust_p_values,
    auroc_together,
    auroc_within,
    correlation_within,
    logistic_effect,
    logistic_together,
)

POOLED, TOGETHER = "all tasks", "all models"
BINS = 5
LEAST_IN_BIN = 10  # documents
_COLUMNS = {"model": "model", "task": "task", "document": "doc_hash"}


def load_documents(runs: Iterable[SavedRun], rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Read the measured documents of the runs in ``rows``.

    Args:
        runs: Runs with their tables and samples.
        rows: Rows of ``load_runs`` with ``label``, one per model and task; ``metric`` tells right
            from wrong.
        notes: Sentences on tables that cannot be read and samples that are not whole are added.

    Returns:
        One row per model, task and document: means over its prompts, with ``score``, ``right``,
        ``confidence`` and ``margin``, NaN where samples lack them. Empty if there is no table.
    """
    remaining = {(row["file"], row["task"]): row for row in rows.to_dict("records")}
    frames = []
    for run in runs:
        for saved in run.tables:
            if row := remaining.pop((str(run.file), saved.task), None):
                answers = answers_of_run(run, saved.task, row["metric"], notes)
                with passing_over(notes):
                    documents = _documents(prompt_values(saved), answers, row["metric"])
                    frames.append(documents.assign(model=row["label"]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _documents(
    prompts: pd.DataFrame, answers: Mapping[str, Mapping[str, Any]], metric: str
) -> pd.DataFrame:
    rows = prompts.assign(prompt_tokens=prompts["n_tokens"])
    names = [*value_names(prompts), "prompt_tokens"]
    documents = means_of_parts(rows, ["task", "doc_hash"], names).reset_index()
    given = [answers.get(doc_hash, {}) for doc_hash in documents["doc_hash"]]
    score = pd.Series(
        [answer.get("scores", {}).get(metric, math.nan) for answer in given], dtype=float
    )
    # The probability of all true answers, for example, is neither right nor wrong.
    is_binary = score.dropna().isin((0, 1)).all()
    right = score if is_binary else score * math.nan
    options = [answer.get("options", ()) for answer in given]
    expected = [answer.get("expected") for answer in given]
    margin = [_margin(*answer) for answer in zip(options, expected, right, strict=True)]
    return documents.assign(
        score=score, right=right, confidence=list(map(_confidence, options)), margin=margin
    )


def _confidence(options: Sequence[tuple[str, float]]) -> float:
    *_, second, first = (-math.inf, -math.inf, *sorted(likelihood for _, likelihood in options))
    return first - second if len(options) > 1 else math.nan


def _margin(options: Sequence[tuple[str, float]], expected: str | None, right: float) -> float:
    """Return the margin of the right choice; NaN where it, or the answer, is not known."""
    choice = None if math.isnan(right) else right_choice(options, expected, bool(right))
    return math.nan if choice is None else margin_of(options, choice)


def document_predictors(documents: pd.DataFrame, main: str) -> list[str]:
    """Return the numbers that prompts have, ``main`` first and then coupling at each rank."""
    names = [name for name in value_names(documents) if documents[name].notna().any()]
    return sorted(names, key=lambda name: (name != main, not name.startswith("coupling@")))


def yardsticks(documents: pd.DataFrame) -> list[str]:
    """Return the predictors that need no look inside: prompt length and confidence."""
    return [name for name in ("prompt_tokens", "confidence") if documents[name].nunique() > 1]


def aurocs(documents: pd.DataFrame, predictors: Sequence[str]) -> dict[tuple[str, str, str], Auroc]:
    """Return the AUROC of every predictor for right answers, by model, task and predictor.

    :data:`POOLED` are the pairs within each task, and :data:`TOGETHER` is the mean over models.
    """
    results: dict[tuple[str, str, str], Auroc] = {}
    for model, group in documents.groupby("model", sort=False):
        for predictor in predictors:
            by_task, pooled = auroc_within(group, predictor, "right", "task")
            areas = by_task | ({POOLED: pooled} if len(by_task) > 1 else {})
            results |= {(model, task, predictor): area for task, area in areas.items()}
    if documents["model"].nunique() > 1:
        for predictor in predictors:
            results[TOGETHER, POOLED, predictor] = auroc_together(
                documents, predictor, "right", **_COLUMNS
            )
    return results


def auroc_table(results: Mapping[tuple[str, str, str], Auroc]) -> pd.DataFrame:
    """Return one row per area, with ``p_holm``.

    Returns:
        p is adjusted for the models and tasks of a predictor, pools apart from single tasks. Of
        all models together it is adjusted for the predictors.
    """
    rows = table(results, "model", "task", "predictor")
    if len(rows):
        pooled, together = rows["task"] == POOLED, rows["model"] == TOGETHER
        many = rows["predictor"].mask(together, TOGETHER)
        rows["p_holm"] = rows.groupby([many, pooled])["p"].transform(adjust_p_values)
    return rows


def logistics(
    documents: pd.DataFrame, predictors: Sequence[str]
) -> dict[tuple[str, str, str, str], LogisticEffect]:
    """Return effects on the odds of a right answer by model, task, predictor and controls."""
    results = {}
    for (model, task), group in _by_task_and_pooled(documents):
        group = group.dropna(subset="right")
        controls = yardsticks(group)
        for predictor in predictors:
            for given in dict.fromkeys([(), tuple(controls)]):
                results[model, task, predictor, " + ".join(given)] = logistic_effect(
                    group,
                    correct="right",
                    predictor=predictor,
                    controls=given,
                    task="task" if task == POOLED else None,
                )
    return results | _odds_together(documents.dropna(subset="right"), predictors[0])


def _odds_together(
    documents: pd.DataFrame, predictor: str
) -> dict[tuple[str, str, str, str], LogisticEffect]:
    """Return the odds of all models together, for the main predictor alone.

    With a level for every task of every model these regressions are large.
    """
    if documents["model"].nunique() < 2:
        return {}
    controls = yardsticks(documents)
    return {
        (TOGETHER, POOLED, predictor, " + ".join(given)): logistic_together(
            documents, correct="right", predictor=predictor, controls=given, **_COLUMNS
        )
        for given in dict.fromkeys([(), tuple(controls)])
    }


def graded(
    documents: pd.DataFrame, predictors: Sequence[str]
) -> dict[tuple[str, str, str, str], Correlation]:
    """Return rank correlations within tasks by model, task, predictor and what is predicted."""
    return {
        (model, task, predictor, of): correlation_within(
            group, predictor, of, "task", method="spearman"
        )
        for (model, task), group in _by_task_and_pooled(documents)
        for predictor in predictors
        for of in ("margin", "score")
        if group[of].notna().any()
    }


def calibration(documents: pd.DataFrame, predictor: str) -> pd.DataFrame:
    """Return the share of right answers in bins of the predictor, by model and task."""
    answered = documents.dropna(subset=["right", predictor])
    parts = [
        accuracy_by_bin(group[predictor], group["right"], bins=_bins(len(group))).assign(
            model=model, task=task, predictor=predictor
        )
        for (model, task), group in answered.groupby(["model", "task"], sort=False)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _bins(documents: int) -> int:
    return max(1, min(BINS, documents // LEAST_IN_BIN))


def _by_task_and_pooled(documents: pd.DataFrame) -> Iterable[tuple[tuple[str, str], pd.DataFrame]]:
    yield from documents.groupby(["model", "task"], sort=False)
    for model, group in documents.groupby("model", sort=False):
        if group["task"].nunique() > 1:
            yield (model, POOLED), group
