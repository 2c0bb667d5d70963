"""Documents one by one: the same ones in two tasks, and coupling against what is known of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import RUN
from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.jsonlines import read_json_lines
from lm_eval_coupling.saved.records import find_tables
from lm_eval_coupling.saved.saved_run import SavedTable
from lm_eval_coupling.statistics import Estimate, as_frame, correlation

_KEYS = [*RUN, "doc_hash", "measure", "depth"]
_GROUP = [
    *RUN,
    "task",
    "measure",
]  # tasks apart: a difference between two of them is none between their documents


def paired(rows: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The documents that both tasks have: ``first, second`` and their ``difference``, second less first.

    Args:
        rows: of :func:`~coupling_analysis.study_tables.long`.
        first: task, such as one without chain of thought.
        second: task on the same documents, joined by ``doc_hash``.

    Returns:
        One row per run, measure, depth and document.

    Raises:
        CouplingError: if no document is in both.
    """
    sides = [
        rows[rows["task"] == task].groupby(_KEYS, dropna=False)["value"].mean()
        for task in (first, second)
    ]
    pairs = pd.concat(sides, axis=1, join="inner", keys=["first", "second"]).reset_index()
    if not len(pairs):
        numbers = [rows.loc[rows["task"] == task, "doc_hash"].nunique() for task in (first, second)]
        raise CouplingError(
            f"got no document in both of {first} ({numbers[0]}) and {second} ({numbers[1]}), expected the same documents; "
            "measure both with the same coupling_seed and coupling_limit"
        )
    return pairs.assign(difference=pairs["second"] - pairs["first"])


def mean_differences(pairs: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Mean of the paired differences with Student's interval, per run, measure and depth; ``n``, ``undefined``, and the
    share of documents in which it is ``positive``.

    Returns:
        One row per run, measure and depth.
    """
    found = []
    for key, group in pairs.groupby([*RUN, "measure", "depth"], sort=False, dropna=False):
        known = group["difference"].dropna()
        n = len(known)
        stderr = known.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        estimate = Estimate.from_t(known.mean(), stderr, max(n - 1, 1), confidence)
        about = dict(zip([*RUN, "measure", "depth"], key, strict=True))
        counts = {"positive": (known > 0).mean(), "n": n, "undefined": len(group) - n}
        found.append(
            about
            | {
                "difference": estimate.value,
                "stderr": stderr,
                "low": estimate.low,
                "high": estimate.high,
            }
            | counts
        )
    return pd.DataFrame(found)


def bins(rows: pd.DataFrame, x: str, number: int = 6) -> pd.DataFrame:
    """Quartiles of ``value`` in bins of ``x`` with about as many documents each, per run, task and measure; ``x`` is the
    bin's mean.

    Returns:
        One row per bin, in the order of the bins.
    """
    rows = rows.dropna(subset=[x, "value"]).reset_index(drop=True)
    codes = rows.groupby(_GROUP, sort=False)[x].transform(lambda v: _bins(v, number))
    found = rows.groupby([*_GROUP, codes.rename("bin")], sort=False).agg(
        x=(x, "mean"),
        q25=("value", lambda v: v.quantile(0.25)),
        median=("value", "median"),
        q75=("value", lambda v: v.quantile(0.75)),
        n=("value", "size"),
    )
    return found.reset_index().sort_values([*_GROUP, "bin"]).rename(columns={"x": x})


def _bins(values: pd.Series, number: int) -> pd.Series:
    """Of few distinct values each is a bin of its own."""
    if values.nunique() <= number:
        return values.rank(method="dense")
    return pd.qcut(values, number, labels=False, duplicates="drop")


def correlations(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """Spearman's correlation of every measure with ``x`` over the documents of a run's task: interval, permutation test."""
    groups = list(rows.groupby(_GROUP, sort=False))
    found = as_frame(
        correlation(of[x], of["value"], method="spearman", resamples=999) for _, of in groups
    )
    about = pd.DataFrame([dict(zip(_GROUP, key, strict=True)) for key, _ in groups])
    return pd.concat([about, found], axis=1)


def fields(paths: Iterable[Path | str], column: str, count: str | None = None) -> dict[str, float]:
    """A number for every document, by ``doc_hash``, from the ``samples_*.jsonl`` beside the tables.

    Args:
        paths: folders that lm-eval wrote with ``--log_samples``.
        column: field of the document; of text such as "Level 3" its first number.
        count: take instead how often this text occurs in the field, as "<<" for the steps of a GSM8K solution.

    Returns:
        By ``doc_hash``, NaN for a document in which there is none.

    Raises:
        CouplingError: if there are no samples, no such field, or no number in it.
    """
    documents = {
        str(sample["doc_hash"]): sample["doc"] for path in paths for sample in _samples(path)
    }
    if not documents:
        raise CouplingError(
            "got no samples_*.jsonl beside the coupling tables, expected some; evaluate with --log_samples"
        )
    known = sorted({name for doc in documents.values() for name in doc})
    if column not in known:
        raise CouplingError(
            f"got column {column!r}, which the documents do not have; choose among {', '.join(known)}"
        )
    numbers = {key: _number(doc.get(column), count) for key, doc in documents.items()}
    if not np.isfinite(list(numbers.values())).any():
        example = next(iter(documents.values())).get(column)
        raise CouplingError(
            f"got {column!r} without numbers, such as {str(example)[:80]!r}; give --count TEXT or --csv FILE"
        )
    return numbers


def _samples(path: Path | str) -> Iterable[dict[str, Any]]:
    for file in sorted(
        {run.samples(table.task) or _beside(table) for run, table in find_tables(path)}
    ):
        yield from (
            sample for sample in read_json_lines(file) if isinstance(sample.get("doc"), dict)
        )


def _beside(table: SavedTable) -> Path:
    """Samples of a table whose results are not there."""
    return table.file.parent / f"samples_{table.task}_{table.about['date']}.jsonl"


def _number(value: Any, count: str | None) -> float:
    if count is not None:
        return float(str(value).count(count)) if value is not None else math.nan
    if isinstance(value, int | float):
        return float(value)
    first = re.search(r"-?\d+(?:\.\d+)?", str(value))
    return float(first[0]) if first else math.nan


def from_csv(file: Path | str, column: str) -> dict[str, float]:
    """A number for every document, by ``doc_hash``, from a CSV file with these two columns.

    Returns:
        By ``doc_hash``, NaN for what is no number.

    Raises:
        CouplingError: if it cannot be read or has no such columns.
    """
    try:
        table = pd.read_csv(file, dtype={"doc_hash": str})
    except (OSError, ValueError) as error:
        raise CouplingError(f"got {file}, which is no readable CSV file ({why(error)})") from None
    if missing := [name for name in ("doc_hash", column) if name not in table]:
        raise CouplingError(
            f"got {file} with the columns {', '.join(table)}, expected one named {missing[0]}"
        )
    return dict(
        zip(
            table["doc_hash"],
            pd.to_numeric(table[column], errors="coerce").astype(float),
            strict=True,
        )
    )


def against(rows: pd.DataFrame, numbers: dict[str, float], name: str) -> pd.DataFrame:
    """``rows`` with a column ``name`` of each document's number.

    Returns:
        Left out are documents without one, and tasks whose documents all have the same.

    Raises:
        CouplingError: if no measured document has one, or all have the same.
    """
    rows = rows.assign(**{name: rows["doc_hash"].map(numbers)})
    if not rows[name].notna().any():
        raise CouplingError(
            f"got {len(numbers)} documents with {name!r}, none of the {rows['doc_hash'].nunique()} measured ones; "
            "expected the same doc_hash in both"
        )
    rows = rows.dropna(subset=name)
    differs = rows.groupby("task")[name].transform("nunique") > 1
    if not differs.any():
        raise CouplingError(
            f"got {name} = {rows[name].iloc[0]:g} for every measured document, expected different numbers"
        )
    return rows[differs]
