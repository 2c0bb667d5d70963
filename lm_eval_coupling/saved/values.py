"""The numbers of every measured prompt, one row each, without its matrices: what tables, lists and regressions need."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lm_eval_coupling.measures.formulas.headline import couplings_of
from lm_eval_coupling.saved.run import SavedTable

WHOLE_PROMPT = ("line_shape_score", "expodistance", "equidistance")  # numbers that have no rank and no depth
_ABOUT = ("task", "doc_id", "doc_hash", "prompt_hash", "prompt_index", "kind", "n_tokens", "position", "reason", "ranks")


def prompt_values(table: SavedTable, weights: str = "trained") -> pd.DataFrame:
    """One row per measured prompt of a table.

    Args:
        table: of one task.
        weights: ``trained``, ``untrained`` or ``all``.

    Returns:
        What a record says of its prompt, ``coupling@K`` for every rank K, ``line_shape_score, expodistance, equidistance``,
        and ``worst_certificate``, the largest of its blocks; NaN where there is none. Matrices are read, some rows at a
        time, only of a table that was written before its couplings were kept beside them.
    """
    columns = [*_ABOUT, *WHOLE_PROMPT, "certificate", "coupling"]
    if "coupling" in table.columns:
        return _by_rank(_with_worst(table.read(columns, weights=weights)))
    parts = []
    for rows in table.batches([*columns, "normalized_miscoupling"], weights=weights):
        couplings = [couplings_of(matrices) for matrices in rows.pop("normalized_miscoupling")]
        parts.append(_with_worst(rows.assign(coupling=pd.Series(couplings, rows.index, dtype=object))))
    return _by_rank(pd.concat(parts, ignore_index=True))


def _with_worst(rows: pd.DataFrame) -> pd.DataFrame:
    worst = [_worst(certificate) for certificate in rows.pop("certificate")]
    return rows.assign(worst_certificate=pd.Series(worst, rows.index, dtype=float))


def document_values(values: pd.DataFrame) -> pd.DataFrame:
    """The numbers of each document: means over its prompts of what is defined; by task, document and prompt.

    Args:
        values: of :func:`prompt_values`.
    """
    names = [*WHOLE_PROMPT, *(f"coupling@{rank}" for rank in ranks_of(values))]
    return values.groupby(["task", "doc_hash", "prompt_hash"], sort=False)[names].mean()


def mean_and_error(values: pd.Series) -> tuple[float, float, int]:
    """Mean, standard error (NaN below two values) and number of the values that are defined."""
    n = int(values.count())
    return (
        float(values.mean()) if n else math.nan,
        float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        n,
    )


def ranks_of(values: pd.DataFrame) -> list[int]:
    """The ranks that any prompt was measured with, ascending."""
    return [int(name.removeprefix("coupling@")) for name in values if name.startswith("coupling@")]


def _by_rank(rows: pd.DataFrame) -> pd.DataFrame:
    ranks = sorted({int(rank) for own in rows["ranks"] for rank in own or ()})
    found = {f"coupling@{rank}": np.full(len(rows), np.nan) for rank in ranks}
    for number, (own, couplings) in enumerate(zip(rows["ranks"], rows.pop("coupling"), strict=True)):
        for rank, value in zip(own or (), couplings or (), strict=False):
            found[f"coupling@{rank}"][number] = math.nan if value is None else value
    return pd.concat([rows, pd.DataFrame(found, rows.index)], axis=1)


def _worst(certificate: np.ndarray | None) -> float:
    return math.nan if certificate is None or np.isnan(certificate).all() else float(np.nanmax(certificate))
