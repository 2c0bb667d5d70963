"""Right and wrong answers of several models to the same documents.

One model may have too few answers to tell. Several models answer the same documents, so that
their answers are not independent: a document counts as one observation, however many models
answered it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import complete_rows
from lm_eval_coupling.statistics.right_answers import (
    Auroc,
    LogisticEffect,
    logistic_effect,
    placements,
    right_and_wrong,
    with_interval,
)

LEVELS = 400  # of a regression; its memory grows with their square
_CELLS = 40_000_000  # of a design matrix: 320 MB


def auroc_together(
    frame: pd.DataFrame,
    value: str,
    correct: str,
    *,
    model: str,
    task: str,
    document: str,
) -> Auroc:
    """Average the AUROC of each model, over all pairs within a task.

    The variance is DeLong's, its parts added up by document before they are squared (Obuchowski
    1997, clustered data). Models are weighted alike and are not sampled: the result holds for
    these models.

    Args:
        frame: One row per model, task and document.
        value: Column of the predictor.
        correct: Column of 0 (wrong) and 1 (right).
        model: Column of model names.
        task: Column of task names; documents are compared within a task.
        document: Column of documents; rows of one document form a cluster.

    Returns:
        The area, or the ``reason`` why there is none. ``right`` and ``wrong`` count the documents
        that are used and that some model answered so. Each model is left out of tasks in which it
        has fewer than 2 right or 2 wrong answers.

    Raises:
        CouplingError: As of :func:`~.right_answers.auroc_within`, or if a model has a document of
            a task twice.
    """
    rows, dropped = complete_rows(frame, [value, correct], [model, task, document])
    _require_unique(rows, [model, task, document])
    # Numbers in place of names, because lookups by name take most of the time.
    tasks, _ = pd.factorize(rows[task])
    documents = rows.groupby([task, document], sort=False).ngroup().to_numpy()
    values, is_right = rows[value].to_numpy(), rows[correct].to_numpy() == 1
    right_and_wrong(values, rows[correct].to_numpy())
    areas = [
        _model_area(values, is_right, tasks, at)
        for at in rows.groupby(model, sort=True).indices.values()
    ]
    used = [area for area in areas if len(area.rows)]
    at = np.concatenate([area.rows for area in areas] or [np.array([], dtype=int)])
    result = Auroc(
        right=len(np.unique(documents[at][is_right[at]])),
        wrong=len(np.unique(documents[at][~is_right[at]])),
        dropped=dropped + len(rows) - len(at),
        tasks=len(np.unique(tasks[at])),
        models=len(used),
    )
    if not used:
        return result.with_reason("no model has 2 right and 2 wrong answers in one task")
    mean = float(np.mean([area.area for area in used]))
    errors = np.bincount(documents[at], np.concatenate([area.errors for area in areas]))
    variance = float(np.sum((errors / len(used)) ** 2))
    return with_interval(dataclasses.replace(result, auroc=mean), variance)


def logistic_together(
    frame: pd.DataFrame,
    *,
    correct: str,
    predictor: str,
    controls: Sequence[str] = (),
    model: str,
    task: str,
    document: str,
) -> LogisticEffect:
    """Regress the right answers of all models, each task of each model with its own level.

    Predictor and controls are in standard deviations of each model's own documents, because
    models differ in them by far. The error is robust against answers to one document going
    together, and ``p`` is Wald's.

    Returns:
        The odds ratio per standard deviation, or the ``reason`` why there is none.

    Raises:
        CouplingError: As of :func:`~.right_answers.logistic_effect`, or if a model has a document
            of a task twice.
    """
    numbers = [predictor, *controls]
    rows, dropped = complete_rows(frame, [correct, *numbers], [model, task, document])
    _require_unique(rows, [model, task, document])
    right_and_wrong(rows[predictor].to_numpy(), rows[correct].to_numpy())
    for name in numbers:
        by_model = rows.groupby(model)[name]
        spread = by_model.transform("std")
        rows[name] = (rows[name] - by_model.transform("mean")) / spread.where(spread > 0)
    rows["level"] = rows[model].astype(str) + "\0" + rows[task].astype(str)
    rows["cluster"] = rows[task].astype(str) + "\0" + rows[document].astype(str)
    levels = rows["level"].nunique()
    if levels > LEVELS or levels * len(rows) > _CELLS:
        return LogisticEffect(
            predictor,
            tuple(controls),
            n=len(rows),
            dropped=dropped,
            reason=f"{levels} tasks of models have a level each, which is more than {LEVELS}"
            if levels > LEVELS
            else f"{len(rows)} answers in {levels} tasks of models are too many for memory",
        )
    result = logistic_effect(
        rows,
        correct=correct,
        predictor=predictor,
        controls=controls,
        task="level",
        cluster="cluster",
    )
    # Models of which a number is constant were dropped there, and then tasks that a model
    # answered all right or all wrong.
    used = rows.dropna(subset=numbers)
    used = used[used.groupby("level")[correct].transform("nunique") > 1]
    return dataclasses.replace(
        result,
        dropped=result.dropped + dropped,
        tasks=int(used[task].nunique()),
        models=int(used[model].nunique()),
        rarer=int(used.groupby(correct)["cluster"].nunique().min()) if len(used) else 0,
    )


@dataclasses.dataclass(frozen=True)
class _ModelArea:
    """Area of one model; ``errors`` are the parts of its error that its used ``rows`` add."""

    area: float
    rows: np.ndarray
    errors: np.ndarray


def _model_area(
    values: np.ndarray, is_right: np.ndarray, tasks: np.ndarray, own: np.ndarray
) -> _ModelArea:
    """Return the area of the model whose rows are ``own``, over tasks with 2 answers of each kind.

    Without such a task no rows are used, and the area is NaN.
    """
    areas, pairs, parts, used = [], [], [], []
    for task in np.unique(tasks[own]):
        of_task = own[tasks[own] == task]
        right, wrong = of_task[is_right[of_task]], of_task[~is_right[of_task]]
        m, n = len(right), len(wrong)
        if min(m, n) < 2:
            continue
        above, below = placements(values[right], values[wrong])
        area = float(above.mean())
        areas.append(area)
        pairs.append(m * n)
        parts += [
            m * n * (above - area) / math.sqrt(m * (m - 1)),
            m * n * (below - area) / math.sqrt(n * (n - 1)),
        ]
        used += [right, wrong]
    if not pairs:
        return _ModelArea(math.nan, np.array([], dtype=int), np.array([]))
    weights = np.array(pairs, dtype=float) / sum(pairs)
    errors = np.concatenate(parts) / sum(pairs)
    return _ModelArea(float(weights @ areas), np.concatenate(used), errors)


def _require_unique(rows: pd.DataFrame, keys: Sequence[str]) -> None:
    if (twice := rows.duplicated(list(keys))).any():
        row = ", ".join(f"{name} {rows.loc[twice, name].iloc[0]}" for name in keys)
        raise CouplingError(f"got two rows of {row}, expected one of each document")
