"""Differences between trainings that share a seed, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lm_eval_coupling.statistics.estimates import Estimate


def paired_differences(rows: pd.DataFrame, control: str, outcomes: Sequence[str]) -> pd.DataFrame:
    """Return how members differ from the control of the same seed, with 95 % t-intervals.

    Args:
        rows: One row per ``seed`` and ``member``, with a column for each outcome.
        control: Name of the member that the others are compared with.
        outcomes: Columns to compare.

    Returns:
        One row per outcome and member; bounds are NaN with fewer than two seeds.
    """
    compared = []
    for outcome in outcomes:
        table = rows.pivot(index="seed", columns="member", values=outcome)
        for member in table.columns.drop(control):
            differences = (table[member] - table[control]).dropna()
            n, mean = len(differences), differences.mean()
            error = differences.sem() if n > 1 else math.nan
            estimate = Estimate.from_t(mean, error, n - 1, 0.95)
            compared.append(
                {"outcome": outcome, "member": member, "control": table[control].mean()}
                | {"difference": mean, "low": estimate.low, "high": estimate.high, "seeds": n}
            )
    return pd.DataFrame(compared)
