"""Values of single documents: paired between two tasks, or related to a number of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import RUN
from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.jsonlines import read_json_lines
from lm_eval_coupling.saved.records import find_tables
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.statistics import Estimate, as_frame, correlation

_PLACE = [*RUN, "measure", "depth"]
# With the task: a difference between two tasks must not pass for one between their documents.
_GROUP = [*RUN, "task", "measure"]


def pair_documents(rows: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Join the values of the documents that two tasks share.

    Args:
        rows: from :func:`~coupling_analysis.study_tables.long`.
        first: task, such as one without chain of thought.
        second: task on the same documents, joined by ``doc_hash``.

    Returns:
        One row per run, measure, depth and document: ``first, second`` and their ``difference``,
        second less first.

    Raises:
        CouplingError: if the tasks share no document.
    """
    sides = [
        rows[rows["task"] == task].groupby([*_PLACE, "doc_hash"], dropna=False)["value"].mean()
        for task in (first, second)
    ]
    pairs = pd.concat(sides, axis=1, join="inner", keys=["first", "second"]).reset_index()
    if not len(pairs):
        a, b = (rows.loc[rows["task"] == task, "doc_hash"].nunique() for task in (first, second))
        raise CouplingError(
            f"got no document in both of {first} ({a}) and {second} ({b}), expected the same "
            "documents; measure both with the same coupling_seed and coupling_limit"
        )
    return pairs.assign(difference=pairs["second"] - pairs["first"])


def mean_differences(pairs: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Average the paired differences, with Student's interval.

    Args:
        pairs: from :func:`pair_documents`.
        confidence: of the interval.

    Returns:
        One row per run, measure and depth: ``difference, stderr, low, high``, the share of
        documents where it is ``positive``, their number ``n``, and how many are ``undefined``.
    """
    rows = []
    for key, group in pairs.groupby(_PLACE, sort=False, dropna=False):
        defined = group["difference"].dropna()
        n = len(defined)
        stderr = defined.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        estimate = Estimate.from_t(defined.mean(), stderr, max(n - 1, 1), confidence)
        rows.append(
            dict(zip(_PLACE, key, strict=True))
            | {"difference": estimate.value, "stderr": stderr}
            | {"low": estimate.low, "high": estimate.high}
            | {"positive": (defined > 0).mean(), "n": n, "undefined": len(group) - n}
        )
    return pd.DataFrame(rows)


def bin_documents(rows: pd.DataFrame, x: str, number: int = 6) -> pd.DataFrame:
    """Group documents by ``x`` into bins of about equal size, per run, task and measure.

    Args:
        rows: with the columns ``value`` and ``x``, one per document.
        x: name of the column.
        number: how many bins; fewer where ``x`` has fewer distinct values.

    Returns:
        One row per bin, ascending: the mean of ``x``, the quartiles of ``value``, and ``n``.
    """
    rows = rows.dropna(subset=[x, "value"]).reset_index(drop=True)
    codes = rows.groupby(_GROUP, sort=False)[x].transform(lambda v: _bin_codes(v, number))
    bins = rows.groupby([*_GROUP, codes.rename("bin")], sort=False).agg(
        x=(x, "mean"),
        q25=("value", lambda v: v.quantile(0.25)),
        median=("value", "median"),
        q75=("value", lambda v: v.quantile(0.75)),
        n=("value", "size"),
    )
    return bins.reset_index().sort_values([*_GROUP, "bin"]).rename(columns={"x": x})


def _bin_codes(values: pd.Series, number: int) -> pd.Series:
    if values.nunique() <= number:
        return values.rank(method="dense")
    return pd.qcut(values, number, labels=False, duplicates="drop")


def correlations(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return Spearman's correlation of each measure with ``x``, per run and task.

    Args:
        rows: with the columns ``value`` and ``x``, one per document.
        x: name of the column.

    Returns:
        One row per run, task and measure, with interval and p-value of a permutation test.
    """
    groups = list(rows.groupby(_GROUP, sort=False))
    outcomes = as_frame(
        correlation(of[x], of["value"], method="spearman", resamples=999) for _, of in groups
    )
    keys = pd.DataFrame([dict(zip(_GROUP, key, strict=True)) for key, _ in groups])
    return pd.concat([keys, outcomes], axis=1)


def read_sample_numbers(
    paths: Iterable[Path | str], column: str, count: str | None = None
) -> dict[str, float]:
    """Read a number of each document from the ``samples_*.jsonl`` beside the tables.

    Args:
        paths: folders that lm-eval wrote with ``--log_samples``.
        column: field of the document; a text such as "Level 3" gives its first number.
        count: count this text in the field instead, such as "<<" for the steps of a GSM8K answer.

    Returns:
        The number by ``doc_hash``, NaN for a document without one.

    Raises:
        CouplingError: if there are no samples, no such field, or no number in it.
    """
    documents = {
        str(sample["doc_hash"]): sample["doc"] for path in paths for sample in _read_samples(path)
    }
    if not documents:
        raise CouplingError(
            "got no samples_*.jsonl beside the coupling tables, expected some; evaluate with "
            "--log_samples"
        )
    fields = sorted({name for doc in documents.values() for name in doc})
    if column not in fields:
        listed = ", ".join(fields)
        raise CouplingError(
            f"got column {column!r}, which the documents do not have; choose among {listed}"
        )
    numbers = {key: _to_number(doc.get(column), count) for key, doc in documents.items()}
    if not np.isfinite(list(numbers.values())).any():
        example = str(next(iter(documents.values())).get(column))[:80]
        raise CouplingError(
            f"got {column!r} without numbers, such as {example!r}; give --count TEXT or --csv FILE"
        )
    return numbers


def _read_samples(path: Path | str) -> Iterator[dict[str, Any]]:
    files = {run.samples(table.task) or _samples_beside(table) for run, table in find_tables(path)}
    for file in sorted(files):
        for sample in read_json_lines(file):
            if isinstance(sample.get("doc"), dict):
                yield sample


def _samples_beside(table: SavedTable) -> Path:
    """Name the samples file of a table whose results file is missing."""
    return table.file.parent / f"samples_{table.task}_{table.about['date']}.jsonl"


def _to_number(value: Any, count: str | None) -> float:
    if count is not None:
        return float(str(value).count(count)) if value is not None else math.nan
    if isinstance(value, int | float):
        return float(value)
    first = re.search(r"-?\d+(?:\.\d+)?", str(value))
    return float(first[0]) if first else math.nan


def from_csv(file: Path | str, column: str) -> dict[str, float]:
    """Read a number of each document from a CSV file with ``doc_hash`` and this column.

    Returns:
        The number by ``doc_hash``, NaN for an empty cell.

    Raises:
        CouplingError: if the file cannot be read or lacks a column, if a document has two rows,
            or a cell is not a number.
    """
    try:
        table = pd.read_csv(file, dtype={"doc_hash": str})
    except (OSError, ValueError) as error:
        raise CouplingError(f"got {file}, which is no readable CSV file ({why(error)})") from None
    if missing := [name for name in ("doc_hash", column) if name not in table]:
        columns = ", ".join(map(str, table))
        raise CouplingError(
            f"got {file} with the columns {columns}, expected one named {missing[0]}"
        )
    repeated = table.loc[table["doc_hash"].duplicated(), "doc_hash"]
    if len(repeated):
        raise CouplingError(
            f"got {file} with several rows of document {repeated.iloc[0]}, expected one row for "
            "each document; average them first"
        )
    numbers = pd.to_numeric(table[column], errors="coerce")
    text = table.loc[numbers.isna() & table[column].notna(), ["doc_hash", column]]
    if len(text):
        document, cell = text.iloc[0]
        raise CouplingError(
            f"got {cell!r} as {column} of document {document} in {file}, expected a number"
        )
    return dict(zip(table["doc_hash"], numbers.astype(float), strict=True))


def join_numbers(rows: pd.DataFrame, numbers: dict[str, float], name: str) -> pd.DataFrame:
    """Add each document's number as the column ``name``.

    Returns:
        The rows of documents that have one, without tasks whose documents all have the same.

    Raises:
        CouplingError: if no measured document has one, or all have the same.
    """
    rows = rows.assign(**{name: rows["doc_hash"].map(numbers)})
    if not rows[name].notna().any():
        raise CouplingError(
            f"got {len(numbers)} documents with {name!r}, none of the "
            f"{rows['doc_hash'].nunique()} measured ones; expected the same doc_hash in both"
        )
    rows = rows.dropna(subset=name)
    differs = rows.groupby("task")[name].transform("nunique") > 1
    if not differs.any():
        raise CouplingError(
            f"got {name} = {rows[name].iloc[0]:g} for every measured document, expected different "
            "numbers"
        )
    return rows[differs]
