"""Several models over the documents that they answered: do right answers have the higher values, all models together?

What one model alone is too small a sample for, several may show. They answered the same documents, so that their answers
are no independent ones: a document counts as one observation, whatever number of models answered it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import check_confidence, complete_rows
from lm_eval_coupling.statistics.right_answers import (
    Auroc,
    LogisticEffect,
    logistic_effect,
    placements,
    with_interval,
)

LEVELS = 400  # of a regression: memory goes as their square


def auroc_together(
    frame: pd.DataFrame,
    value: str,
    correct: str,
    *,
    model: str,
    task: str,
    document: str,
    confidence: float = 0.95,
) -> Auroc:
    """Mean over models of the AUROC of each (of all pairs within a task, as ``auroc_within`` has it).

    The variance is DeLong's, its parts added up by document before they are squared (Obuchowski 1997, clustered data); ``p``
    is Wald's with it. Models are weighed alike, and are not sampled: it is said of these models.

    Args:
        frame: one row per model, task and document.
        value: column of the predictor.
        correct: column of 0 (wrong) and 1 (right).
        model: column of names.
        task: column of names; documents are compared within a task.
        document: column; rows of one document are of one cluster.
        confidence: of the interval.

    Returns:
        The area with ``models`` of them and ``right`` and ``wrong`` answers in all, or a ``reason`` why there is none.
        Models without 2 right and 2 wrong answers in one task have no part in it.

    Raises:
        CouplingError: as of ``auroc_within``; if a model has a document of a task twice.
    """
    check_confidence(confidence)
    rows, dropped = complete_rows(frame, [value, correct], [model, task, document])
    _require_once(rows, [model, task, document])
    found = [
        _of_model(of_model, value, correct, task, document)
        for _, of_model in rows.groupby(model, sort=True)
    ]
    used = [one for one in found if one.right]
    result = Auroc(
        right=sum(one.right for one in used),
        wrong=sum(one.wrong for one in used),
        dropped=dropped + sum(one.dropped for one in found),
        tasks=rows[task].nunique(),
        models=len(used),
        confidence=confidence,
    )
    if not used:
        return dataclasses.replace(
            result, reason="no model has 2 right and 2 wrong answers in one task"
        )
    area = float(np.mean([one.area for one in used]))
    parts = pd.concat([one.parts for one in used]).groupby(level=0).sum() / len(used)
    result = with_interval(dataclasses.replace(result, auroc=area), float((parts**2).sum()))
    p = float(2 * stats.norm.sf(abs(area - 0.5) / result.stderr)) if result.stderr else math.nan
    return dataclasses.replace(result, p=p)


def logistic_together(
    frame: pd.DataFrame,
    *,
    correct: str,
    predictor: str,
    controls: Sequence[str] = (),
    model: str,
    task: str,
    document: str,
    confidence: float = 0.95,
) -> LogisticEffect:
    """``logistic_effect`` of all models at once, each task of each model with its own level of difficulty.

    Predictor and controls are in standard deviations of each model's own documents, for models differ in them by far. The
    error is robust against answers to one document going together; ``p`` is Wald's.

    Returns:
        The odds ratio per standard deviation, or a ``reason`` why there is none.

    Raises:
        CouplingError: as of ``logistic_effect``; if a model has a document of a task twice.
    """
    numbers = [predictor, *controls]
    rows, dropped = complete_rows(frame, [correct, *numbers], [model, task, document])
    _require_once(rows, [model, task, document])
    for name in numbers:
        spread = rows.groupby(model)[name].transform("std")
        rows[name] = (rows[name] - rows.groupby(model)[name].transform("mean")) / spread.where(
            spread > 0
        )
    rows["level"] = rows[model].astype(str) + "\0" + rows[task].astype(str)
    if (levels := rows["level"].nunique()) > LEVELS:
        told = f"{levels} tasks of models have a level each, which is more than {LEVELS}"
        return LogisticEffect(
            predictor,
            tuple(controls),
            n=len(rows),
            dropped=dropped,
            confidence=confidence,
            reason=told,
        )
    found = logistic_effect(
        rows,
        correct=correct,
        predictor=predictor,
        controls=controls,
        task="level",
        cluster=document,
        confidence=confidence,
    )
    mixed = (
        rows.groupby("level")[correct].transform("nunique") > 1
    )  # the others say nothing and are dropped
    used = rows[mixed]
    return dataclasses.replace(
        found,
        dropped=found.dropped + dropped,
        tasks=int(used[task].nunique()),
        models=int(used[model].nunique()),
    )


@dataclasses.dataclass(frozen=True)
class _OfModel:
    """``parts``: what each document adds to the error of the model's area."""

    dropped: int
    area: float = math.nan
    right: int = 0
    wrong: int = 0
    parts: pd.Series | None = None


def _of_model(rows: pd.DataFrame, value: str, correct: str, task: str, document: str) -> _OfModel:
    areas, pairs, parts, right, wrong, dropped = [], [], [], 0, 0, 0
    for _, of_task in rows.groupby(task, sort=True):
        is_right = of_task[correct] == 1
        m, n = int(is_right.sum()), int((~is_right).sum())
        if min(m, n) < 2:
            dropped += m + n
            continue
        right, wrong = right + m, wrong + n
        above, below = placements(
            of_task.loc[is_right, value].to_numpy(), of_task.loc[~is_right, value].to_numpy()
        )
        area = float(above.mean())
        errors = np.concatenate(
            [(above - area) / math.sqrt(m * (m - 1)), (below - area) / math.sqrt(n * (n - 1))]
        )
        names = pd.concat([of_task.loc[is_right, document], of_task.loc[~is_right, document]])
        areas.append(area)
        pairs.append(m * n)
        parts.append(pd.Series(errors, index=names.to_numpy()))
    if not pairs:
        return _OfModel(dropped)
    weights = np.array(pairs, dtype=float) / sum(pairs)
    weighed = pd.concat([weight * part for weight, part in zip(weights, parts, strict=True)])
    return _OfModel(dropped, area=float(weights @ areas), right=right, wrong=wrong, parts=weighed)


def _require_once(rows: pd.DataFrame, keys: Sequence[str]) -> None:
    if (twice := rows.duplicated(list(keys))).any():
        told = ", ".join(f"{name} {rows.loc[twice, name].iloc[0]}" for name in keys)
        raise CouplingError(f"got two rows of {told}, expected one of each document")
