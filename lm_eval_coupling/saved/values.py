"""The numbers of every measured prompt, one row each, without its matrices: what tables, lists and regressions need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.measures.formulas import means
from lm_eval_coupling.measures.formulas.headline import couplings_of
from lm_eval_coupling.measures.registry import Reading, prompt_readings, record_columns
from lm_eval_coupling.saved.saved_run import SavedTable

# What a table says of a prompt, whoever reads it.
PROMPT = (
    "doc_id",
    "doc_hash",
    "prompt_hash",
    "prompt_index",
    "kind",
    "n_tokens",
    "position",
    "reason",
    "ranks",
)
_ABOUT = ("task", *PROMPT, "window", "certificate", "coupling", "weights")


def prompt_values(table: SavedTable, weights: str = "trained") -> pd.DataFrame:
    """One row per measured prompt of a table.

    Args:
        table: of one task.
        weights: ``trained``, ``untrained`` or ``all``.

    Returns:
        What a record says of its prompt; ``coupling@K`` for every rank K; every other reading that is one number of a prompt
        and needs no matrix of layers, by its name (:func:`plain_readings`), or by ``NAME@K`` (:func:`ranked_readings`); and
        ``worst_certificate``, the largest of the blocks. NaN where there is none. Matrices are read, some rows at a time,
        only of a table that was written before its couplings were kept beside them.
    """
    known = [reading for reading in plain_readings() if reading.column in table.columns]
    columns = [*_ABOUT, *(reading.column for reading in (*known, *ranked_readings()))]
    if "coupling" in table.columns:
        return _by_rank(_read(table.read(columns, weights=weights), known))
    parts = []
    for rows in table.batches([*columns, "normalized_miscoupling"], weights=weights):
        couplings = [couplings_of(matrices) for matrices in rows.pop("normalized_miscoupling")]
        parts.append(
            _read(rows.assign(coupling=pd.Series(couplings, rows.index, dtype=object)), known)
        )
    return _by_rank(pd.concat(parts, ignore_index=True))


def plain_readings() -> tuple[Reading, ...]:
    """The readings that are one number of a prompt, have no rank and are read from no more than a number per layer."""
    dimensions = {name: column.dimensions for name, column in record_columns().items()}
    return tuple(
        r for r in prompt_readings() if not r.of_rank and len(dimensions.get(r.column, ())) < 2
    )


def ranked_readings() -> tuple[Reading, ...]:
    """The readings that are one number of a prompt for every rank, kept in a column of their own."""
    columns = record_columns()
    return tuple(
        r for r in prompt_readings() if r.of_rank and columns[r.column].dimensions == ("rank",)
    )


def _read(rows: pd.DataFrame, known: Sequence[Reading]) -> pd.DataFrame:
    records = rows.to_dict("records")
    found: dict[str, list[float]] = {
        reading.name: [_number(reading, record) for record in records] for reading in known
    }
    found["worst_certificate"] = [_worst(record.get("certificate")) for record in records]
    wanted = {*_ABOUT, *(reading.column for reading in ranked_readings())} - {"certificate"}
    kept = [name for name in rows if name in wanted and name not in found]
    return pd.concat([rows[kept], pd.DataFrame(found, rows.index, dtype=float)], axis=1)


def _number(reading: Reading, record: Mapping[str, Any]) -> float:
    value = None if record[reading.column] is None else reading.read(record, 0)
    return math.nan if value is None else float(value)


def value_names(values: pd.DataFrame) -> list[str]:
    """The columns of :func:`prompt_values` that are numbers measured of the prompt, coupling first."""
    of_rank = [
        f"{name}@{rank}"
        for name in ("coupling", *(r.name for r in ranked_readings()))
        for rank in ranks_of(values)
    ]
    return [
        name
        for name in (*of_rank, *(reading.name for reading in plain_readings()))
        if name in values
    ]


def document_values(values: pd.DataFrame) -> pd.DataFrame:
    """The numbers of each document: means over its prompts of what is defined; by task, document and prompt.

    Args:
        values: of :func:`prompt_values`.

    Returns:
        A row per document, a column per number; NaN where no prompt has it.
    """
    return values.groupby(["task", "doc_hash", "prompt_hash"], sort=False)[
        value_names(values)
    ].mean()


def mean_and_error(values: pd.Series) -> tuple[float, float, int]:
    """Mean, standard error (NaN below two values) and number of the values that are defined."""
    found = means.mean_and_error(values)
    return found["mean"], found["stderr"], int(found["n"])


def ranks_of(values: pd.DataFrame) -> list[int]:
    """The ranks that any prompt was measured with, ascending."""
    return [int(name.removeprefix("coupling@")) for name in values if name.startswith("coupling@")]


def _by_rank(rows: pd.DataFrame) -> pd.DataFrame:
    ranks = sorted({int(rank) for own in rows["ranks"] for rank in own or ()})
    names = {"coupling": "coupling"} | {
        reading.column: reading.name for reading in ranked_readings()
    }
    found: dict[str, np.ndarray] = {}
    for column, name in [(column, name) for column, name in names.items() if column in rows]:
        found |= {f"{name}@{rank}": np.full(len(rows), np.nan) for rank in ranks}
        for number, (own, values) in enumerate(zip(rows["ranks"], rows.pop(column), strict=True)):
            for rank, value in zip(own or (), () if values is None else values, strict=False):
                found[f"{name}@{rank}"][number] = math.nan if value is None else value
    return pd.concat([rows, pd.DataFrame(found, rows.index)], axis=1)


def _worst(certificate: np.ndarray | None) -> float:
    return (
        math.nan
        if certificate is None or np.isnan(certificate).all()
        else float(np.nanmax(certificate))
    )
