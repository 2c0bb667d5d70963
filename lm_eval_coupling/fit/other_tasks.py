"""Scores of the other tasks as a rival: what a model's other benchmarks already say of a score.

Scores of many benchmarks over many models are close to rank two (arXiv 2606.24020), so that most
of what predicts one of them is a summary of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

MEAN, COMPONENT = "other_tasks_mean", "other_tasks_component"
OTHER_TASKS = (MEAN, COMPONENT)
_FEWEST = 4  # models; the location and scale of one's tasks come from the others


def add_other_tasks(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Add the summaries of the other tasks' scores to each row.

    ``other_tasks_mean`` is the mean z-score of a model over the other tasks, and
    ``other_tasks_component`` their first principal component. Mean, deviation and loadings of every
    task are those of the other models, so that a model's own scores shape neither.

    Args:
        rows: one per model (``label``) and score (``score_of``), higher being better.
        notes: a sentence on tasks that count for no other task is added.

    Returns:
        The rows with both columns, NaN where there is no other task that all models have.
    """
    scores = rows.pivot_table("score", "label", "score_of", aggfunc="first", dropna=False)
    complete = scores.columns[scores.notna().all()]
    if 0 < len(complete) < scores.shape[1]:
        lacking = ", ".join(map(str, [name for name in scores.columns if name not in complete]))
        notes.append(f"no rival of the other tasks' scores, as models lack them: {lacking}")
    summaries: dict[tuple[str, str], tuple[float, float]] = {}
    for score_of in scores.columns if len(scores) >= _FEWEST else ():
        if others := [name for name in complete if name != score_of]:
            of_models = left_out_summaries(scores[others].to_numpy(dtype=float))
            for label, *values in zip(scores.index, *of_models, strict=True):
                summaries[score_of, label] = (values[0], values[1])
    nothing = (math.nan, math.nan)
    keys = zip(rows["score_of"], rows["label"], strict=True)
    own = [summaries.get(key, nothing) for key in keys]
    return rows.assign(
        **{name: [values[place] for values in own] for place, name in enumerate(OTHER_TASKS)}
    )


def left_out_summaries(
    scores: Float[np.ndarray, "model task"],
) -> tuple[Sequence[float], Sequence[float]]:
    """Return each model's mean z-score and first principal component, seen from the other models.

    Tasks in which the other models all have one score say nothing and are left out. The component
    points the way in which scores rise together.

    Args:
        scores: of at least two models.

    Returns:
        Both by model; NaN for a model without a task that varies among the others.
    """
    means, components = [], []
    for model in range(len(scores)):
        others = np.delete(scores, model, axis=0)
        deviation = others.std(axis=0, ddof=1)
        varies = deviation > 1e-12 * np.abs(others).max(axis=0)
        if not varies.any():
            means.append(math.nan)
            components.append(math.nan)
            continue
        center, deviation = others.mean(axis=0)[varies], deviation[varies]
        own = (scores[model, varies] - center) / deviation
        _, _, directions = np.linalg.svd((others[:, varies] - center) / deviation)
        loadings = directions[0] * (1 if directions[0].sum() >= 0 else -1)
        means.append(float(own.mean()))
        components.append(float(own @ loadings))
    return means, components
