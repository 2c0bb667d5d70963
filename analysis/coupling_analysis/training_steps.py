"""Training steps of checkpoints, read from their names."""

from __future__ import annotations

import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.names import facts_from_name


def add_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``lineage`` (the training) and ``step`` to rows of checkpoints; drop all other rows.

    Args:
        rows: with ``model`` and ``revision``.

    Returns:
        The rows of checkpoints.

    Raises:
        CouplingError: if no training has two checkpoints.
    """
    names = zip(rows["model"], rows["revision"], strict=True)
    facts = pd.DataFrame([facts_from_name(*name) for name in names], index=rows.index)
    rows = rows.assign(lineage=facts["lineage"], step=facts["step"]).dropna(subset="step")
    steps = rows.groupby("lineage")["step"].nunique()
    if not (steps > 1).any():
        raise CouplingError(
            f"got {int(steps.sum())} checkpoints of a training, expected at least two; measure "
            "revisions such as revision=step1000, or folders such as checkpoint-1000"
        )
    return rows
