"""Numbers that a terminal shows of saved runs: coupling and score, one row per run, task and K."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.report.table_numbers import (
    TableNumbers,
    describe_differences,
    read_columns,
    table_numbers,
)
from lm_eval_coupling.saved.names import full_names, label_rows
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.saved.task_rows import rows_of_run


def overview(tables: Sequence[tuple[SavedRun, SavedTable]], problems: list[str]) -> pd.DataFrame:
    """Return one row per table and rank: means over documents with their standard errors.

    Args:
        tables: with their runs.
        problems: a sentence on each table that cannot be read is added.

    Returns:
        Empty if no table can be read. Columns:

        * ``label`` (of the run), ``folder, model, revision, variant, dtype, fingerprint,
          prompting, task``;
        * ``metric, score, score_stderr, scored``: the metric that lm-eval lists first, and the
          documents behind it;
        * ``rank, documents, coupling, coupling_stderr, chance, excess``;
        * ``untrained, untrained_stderr``, and the trained less the untrained weights over the
          documents of both (:func:`~.table_numbers.describe_differences`); ``seed`` of the twin;
        * every other number of a prompt by its name, with its ``_stderr``;
        * ``worst_certificate, missing`` (in words); ``file`` of the table.
    """
    scores: dict[int, dict[str, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    columns = read_columns([table for _, table in tables], problems)
    for place, numbers in table_numbers(columns):
        run, table = tables[place]
        if id(run) not in scores:
            tasks = rows_of_run(run) if run.file else ()
            scores[id(run)] = {row["task"]: main_score(row) for row in tasks}
        rows += _rows(run, table, numbers, scores[id(run)].get(table.task, {}))
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    return frame.assign(label=label_rows(frame, full_names(frame["model"].unique())))


def main_score(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score that lm-eval lists first, from a row of one task."""
    metric = row["metric"]
    return {
        "metric": metric,
        "score": row.get(metric, math.nan),
        "score_stderr": row.get(metric and metric.replace(",", "_stderr,", 1), math.nan),
        "scored": row["n_samples"],
    }


def _rows(
    run: SavedRun, table: SavedTable, numbers: TableNumbers, score: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    about: dict[str, Any] = {
        "folder": str(table.file.parent),
        "model": run.model,
        "revision": run.revision,
        "variant": run.variant,
        "dtype": run.dtype,
        "fingerprint": run.fingerprint,
        "prompting": run.prompting(table.task),
        "task": table.task,
    } | dict(score)
    others: dict[str, Any] = {}
    for name in [name for name in numbers.means if "@" not in name]:
        others[name], others[f"{name}_stderr"], _ = numbers.means[name]
    others |= {
        "worst_certificate": numbers.worst_certificate,
        "missing": numbers.missing,
        "seed": (table.about.get("untrained") or {}).get("seed"),
        "file": str(table.file),
    }
    ranks: list[int | None] = [*numbers.ranks] or [None]
    for rank in ranks:
        mean, error, n = numbers.coupling(rank)
        twin_mean, twin_error, _ = numbers.twin_coupling(rank)
        chance = math.nan if rank is None else chance_coupling(rank)
        coupling = {
            "rank": rank,
            "documents": n,
            "coupling": mean,
            "coupling_stderr": error,
            "chance": chance,
            "excess": mean - chance,
            "untrained": twin_mean,
            "untrained_stderr": twin_error,
        }
        yield about | coupling | dict(numbers.difference(rank)) | others


def paired_difference(first: pd.Series, second: pd.Series) -> dict[str, float | int]:
    """Describe first less second over the documents of both (:func:`describe_differences`)."""
    return describe_differences(first - second if len(first) and len(second) else ())
