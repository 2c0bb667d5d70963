"""Coupling and the score of one training over its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lm_eval_coupling.saved.names import label_trainings
from lm_eval_coupling.statistics import Correlation, correlation


def checkpoints(rows: pd.DataFrame, predictor: str, notes: list[str]) -> pd.DataFrame:
    """Select the rows of trainings that were saved at two steps or more, in order.

    Checkpoints that were run in another way, such as in another dtype, are of another curve.

    Args:
        rows: of :func:`~.scores.scored_rows`.
        predictor: a column that is known of every checkpoint that counts.
        notes: a sentence is added for each step that has several weights, and if the predictor is
            none of single runs.

    Returns:
        ``lineage, score_of, step, score, …``, each step once; ``lineage`` is the label of the
        training (:func:`~lm_eval_coupling.saved.names.label_trainings`).
    """
    steps = rows[rows["step"].notna() & rows["score"].notna()]
    if predictor not in rows:  # the scores of other tasks, which compare models
        if steps["step"].nunique() > 1:
            notes.append(f"no curves over checkpoints, as {predictor} compares models")
        return steps.iloc[:0]
    steps = steps[steps[predictor].notna()]
    steps = steps.assign(lineage=label_trainings(steps))
    curve = ["lineage", "score_of"]
    of_step, of_weights = (steps.groupby([*curve, name]) for name in ("step", "fingerprint"))
    is_doubtful = {
        "several weights at step {:g}, of which the newest count": of_step["fingerprint"],
        "the weights of step {:g} at another step as well": of_weights["step"],
    }
    for words, values in is_doubtful.items():
        doubtful = steps.loc[values.transform("nunique") > 1, ["lineage", "step"]]
        for lineage, step in doubtful.drop_duplicates().to_numpy():
            notes.append(f"{lineage} has {words.format(step)}")
    steps = steps.sort_values("time").drop_duplicates([*curve, "step"], keep="last")
    several = steps.groupby(curve)["step"].transform("nunique") > 1
    return steps[several].sort_values([*curve, "step"], ignore_index=True)


def along_training(
    steps: pd.DataFrame, predictor: str, *, resamples: int = 1999
) -> dict[tuple[str, str, str, str], Correlation]:
    """Return rank correlations of predictor and score over the checkpoints of each training.

    They are by lineage, score, predictor and ``levels`` or ``changes``. Numbers that grow with
    training go together in levels, whatever the reason. Their changes from one checkpoint to the
    next say more.
    """
    return {
        (lineage, score, predictor, of): correlation(x, y, method="spearman", resamples=resamples)
        for (lineage, score), group in steps.groupby(["lineage", "score_of"], sort=False)
        for of, x, y in _levels_and_changes(group[predictor].to_numpy(), group["score"].to_numpy())
    }


def _levels_and_changes(
    x: np.ndarray, y: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    yield "levels", x, y
    yield "changes", np.diff(x), np.diff(y)
