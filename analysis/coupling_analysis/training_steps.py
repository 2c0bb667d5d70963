"""Checkpoints of one training, in the order of their steps."""

from __future__ import annotations

import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.names import facts_from_name


def with_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` of checkpoints with the columns ``lineage`` (whose they are) and ``step``; others are left out.

    Returns:
        The rows that are left.

    Raises:
        CouplingError: if there are fewer than two checkpoints.
    """
    runs = zip(rows["model"], rows["revision"], strict=True)
    facts = pd.DataFrame([facts_from_name(*run) for run in runs], index=rows.index)
    rows = rows.assign(lineage=facts["lineage"], step=facts["step"]).dropna(subset="step")
    steps = rows.groupby("lineage")["step"].nunique()
    if not (steps > 1).any():
        raise CouplingError(
            f"got {int(steps.sum())} checkpoints of a training, expected at least two; measure revisions such as "
            "revision=step1000, or folders such as checkpoint-1000"
        )
    return rows
