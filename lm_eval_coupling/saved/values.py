"""The numbers of every measured prompt, one row each, read without its matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.measures.formulas import means
from lm_eval_coupling.measures.formulas.certificates import (
    columns_from_jacobians,
    counted_certificate,
    largest_certificate,
)
from lm_eval_coupling.measures.registry import Reading, prompt_readings, record_columns
from lm_eval_coupling.saved.arrow_columns import frame_of_columns
from lm_eval_coupling.saved.saved_table import SavedTable, is_first

# Columns of a table that say which prompt a row is.
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
_ABOUT = ("task", *PROMPT, "window", "weights")


def prompt_values(
    table: SavedTable, weights: str = "trained", names: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read one row per measured prompt of a table.

    Args:
        table: of one task.
        weights: ``trained``, ``untrained`` or ``all``.
        names: of the readings to read besides coupling; by default all.

    Returns:
        What a record says of its prompt; ``coupling@K`` for every rank K; every other reading that
        is one number of a prompt, by its name (:func:`plain_readings`) or by ``NAME@K``
        (:func:`ranked_readings`); and ``worst_certificate``, the largest of the Jacobians that gave
        a number at any of the prompt's measured tokens. NaN where a number is missing.
    """
    return frame_of_columns(prompt_columns(table, weights, names))


def prompt_columns(
    table: SavedTable, weights: str = "trained", names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Read the columns of :func:`prompt_values` without making a frame of them."""
    plain = [r for r in plain_readings() if r.column in table.columns and _is_wanted(r, names)]
    ranked = [r for r in ranked_readings() if r.column in table.columns and _is_wanted(r, names)]
    numbers = ["coupling", *(name for name in _lightest_columns() if name in table.columns)]
    of_readings = [reading.column for reading in (*plain, *ranked)]
    names_read = [*_ABOUT, "certificate", *numbers, *of_readings]
    columns = table.read_columns(names_read, weights, places="all")
    certificates, first = _certificates(columns, numbers), is_first(columns["place"])
    columns = {name: values_of_rows[first] for name, values_of_rows in columns.items()}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    values: dict[str, Any] = {
        reading.name: np.array([_number(reading, record) for record in records], dtype=float)
        for reading in plain
    }
    values["worst_certificate"] = certificates[first]
    kept = [name for name in columns if name in _ABOUT and name not in values]
    values = {name: columns[name] for name in kept} | values
    of_rank = {"coupling": columns["coupling"]} | {r.name: columns[r.column] for r in ranked}
    return values | _by_rank(columns["ranks"], of_rank)


def _is_wanted(reading: Reading, names: Sequence[str] | None) -> bool:
    return names is None or reading.name in names


def plain_readings() -> tuple[Reading, ...]:
    """Return the readings that are one number of a prompt, without a rank.

    They are read from no more than a number per layer.
    """
    dimensions = {name: column.dimensions for name, column in record_columns().items()}
    return tuple(
        r for r in prompt_readings() if not r.of_rank and len(dimensions.get(r.column, ())) < 2
    )


def ranked_readings() -> tuple[Reading, ...]:
    """Return the readings that are one number of a prompt per rank, kept in their own column."""
    columns = record_columns()
    return tuple(
        r for r in prompt_readings() if r.of_rank and columns[r.column].dimensions == ("rank",)
    )


def _number(reading: Reading, record: Mapping[str, Any]) -> float:
    value = None if record[reading.column] is None else reading.read(record, 0)
    return math.nan if value is None else float(value)


def _lightest_columns() -> list[str]:
    """Return a column of each measure that tells whether its Jacobians gave a number."""
    measures = columns_from_jacobians()
    return [min(columns, key=lambda column: len(column.dimensions)).name for columns in measures]


def _certificates(columns: Mapping[str, np.ndarray], numbers: Sequence[str]) -> np.ndarray:
    """Return for each row the largest certificate that counts at any token of its prompt."""
    read = ("certificate", *numbers)
    own = [
        counted_certificate(dict(zip(read, row, strict=True)), numbers)
        for row in zip(*(columns[name] for name in read), strict=True)
    ]
    key = ("weights", "doc_hash", "prompt_hash", "prompt_index")
    prompts = [*zip(*(columns[name] for name in key), strict=True)]
    of_prompt: dict[tuple[Any, ...], list[float]] = {}
    for prompt, certificate in zip(prompts, own, strict=True):
        of_prompt.setdefault(prompt, []).append(certificate)
    largest = {prompt: largest_certificate(values) for prompt, values in of_prompt.items()}
    return np.array([largest[prompt] for prompt in prompts], dtype=float)


def _by_rank(ranks: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split columns of a number per rank into a column for every rank."""
    every = sorted({int(rank) for own in ranks for rank in own or ()})
    numbers = {f"{name}@{rank}": np.full(len(ranks), np.nan) for name in columns for rank in every}
    for name, values_of_rows in columns.items():
        for row, (own, values) in enumerate(zip(ranks, values_of_rows, strict=True)):
            for rank, value in zip(own or (), () if values is None else values, strict=False):
                numbers[f"{name}@{rank}"][row] = math.nan if value is None else value
    return numbers


def value_names(values: pd.DataFrame) -> list[str]:
    """Return the columns of :func:`prompt_values` that are measured numbers, coupling first."""
    of_rank = [
        f"{name}@{rank}"
        for name in ("coupling", *(r.name for r in ranked_readings()))
        for rank in ranks_of(values)
    ]
    every = (*of_rank, *(reading.name for reading in plain_readings()))
    return [name for name in every if name in values]


def document_values(values: pd.DataFrame) -> pd.DataFrame:
    """Average the numbers of each document over its prompts.

    Args:
        values: of :func:`prompt_values`, or of several tables with the number of each in ``table``.

    Returns:
        One row for each table, task, ``doc_hash`` and ``prompt_hash`` (the hash of the document's
        first request), with a column for each number. NaN if one prompt of the document lacks it.
    """
    document = [name for name in ("table", "task", "doc_hash", "prompt_hash") if name in values]
    names = value_names(values)
    if values.empty:
        return pd.DataFrame(columns=names, dtype=float)
    if not values.duplicated(document).any():
        return values.set_index(document)[names]  # much faster, and the same
    return means_of_parts(values, document, names)


def means_of_parts(rows: pd.DataFrame, key: list[str], names: Sequence[str]) -> pd.DataFrame:
    """Average columns over the rows of each key; NaN where one of these rows has no value."""
    parts = rows.groupby(key, sort=False, dropna=False)[[*names]]
    return parts.mean().where(parts.count().eq(parts.size(), axis=0))


def mean_and_error(values: pd.Series) -> tuple[float, float, int]:
    """Return mean, standard error (NaN below two values) and number of the defined values."""
    summary = means.mean_and_error(values)
    return summary["mean"], summary["stderr"], int(summary["n"])


def ranks_of(values: Iterable[str]) -> list[int]:
    """Return the ranks that any prompt was measured with, ascending, from the names of columns."""
    return [int(name.removeprefix("coupling@")) for name in values if name.startswith("coupling@")]
