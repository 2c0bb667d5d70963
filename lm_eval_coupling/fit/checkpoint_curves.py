"""Coupling and the score of one training over its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lm_eval_coupling.saved.names import label_trainings
from lm_eval_coupling.statistics import Correlation, correlation


def checkpoints(rows: pd.DataFrame, predictor: str) -> pd.DataFrame:
    """Select the rows of trainings that were saved at two steps or more, in order.

    Checkpoints that were run in another way, such as in another dtype, are of another curve.

    Returns:
        ``lineage, score_of, step, score, …``, each step once; ``lineage`` is the label of the
        training (:func:`~lm_eval_coupling.saved.names.label_trainings`).
    """
    steps = rows[rows["step"].notna() & rows["score"].notna() & rows[predictor].notna()]
    steps = steps.assign(lineage=label_trainings(steps))
    curve = ["lineage", "score_of"]
    steps = steps.sort_values("time").drop_duplicates([*curve, "step"], keep="last")
    several = steps.groupby(curve)["step"].transform("nunique") > 1
    return steps[several].sort_values([*curve, "step"], ignore_index=True)


def along_training(
    steps: pd.DataFrame, predictor: str, *, resamples: int = 1999
) -> dict[tuple[str, str, str, str], Correlation]:
    """Correlate (Spearman) predictor and score over the checkpoints of each training.

    Numbers that grow with training go together in levels, whatever the reason. Their changes from
    one checkpoint to the next say more.

    Returns:
        The correlations by lineage, score, predictor and ``levels`` or ``changes``.
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
