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
    columns = [*_ABOUT, *WHOLE_PROMPT, "certificate"]
    matrices = [] if "coupling" in table.columns else ["normalized_miscoupling"]
    parts = []
    for rows in table.batches([*columns, "coupling", *matrices], weights=weights, rows=64 if matrices else 1 << 14):
        if matrices:
            rows["coupling"] = list(map(couplings_of, rows.pop("normalized_miscoupling")))
        worst = [_worst(certificate) for certificate in rows.pop("certificate")]
        parts.append(rows.assign(worst_certificate=pd.Series(worst, rows.index, dtype=float)))
    return _by_rank(pd.concat(parts, ignore_index=True))


def document_values(values: pd.DataFrame, column: str) -> pd.Series:
    """A number of each document: the mean over its prompts, what is undefined left out; by task, document and prompt.

    Args:
        values: of :func:`prompt_values`.
        column: such as ``coupling@10``.
    """
    return values.groupby(["task", "doc_hash", "prompt_hash"], sort=False)[column].mean().dropna()


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
    known = () if certificate is None else certificate[~np.isnan(certificate)]
    return float(max(known, default=math.nan)) if len(known) else math.nan
