"""The values of a run, put where lm-eval looks for them: its results, its samples, and tables beside both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.runs.closing import closing_lines
from lm_eval_coupling.runs.rows import DocumentKey, Row, document_couplings
from lm_eval_coupling.saved.strict_json import strict
from lm_eval_coupling.saved.tables import TRAINED, write_tables


class CouplingInfo(dict):
    """What the results say under ``config.coupling``; carries the rows until whoever saves the results writes the tables.

    lm-eval hands its results on as plain dictionaries, from an evaluation to a tracker that may be made much later.
    """

    def __init__(
        self, facts: Mapping[str, Any], rows: Sequence[Row] = (), out: Path | None = None
    ) -> None:
        """Keep ``rows`` for the tables, which go to ``out`` where that is given."""
        super().__init__(strict(facts, name=lambda rank_or_text: rank_or_text))
        self.rows = rows
        self.out = out
        self.tables: list[Path] = []
        self.unwritten = ""  # why there are no tables, where there ought to be

    def closing(self, results: Mapping[str, Any]) -> str:
        """What is printed under lm-eval's table; nothing where nothing was measured or the rows are gone."""
        return closing_lines(self, results) if self.get("tasks") and self.rows else ""

    def write_tables(self, folder: Path | None, date: str) -> list[Path]:
        """Write the tables into ``coupling_out``, else into ``folder``; nowhere if there is neither.

        A run has its tables once: those written before, under an earlier date, are replaced.

        Returns:
            The files that were written.
        """
        folder = self.out or folder
        if folder is None or not self.rows:
            return []
        written = []
        for task in dict.fromkeys(row.document.task for row in self.rows):
            own = [row.to_columns() for row in self.rows if row.document.task == task]
            written += write_tables(
                own, folder, date, self | {"prompts": self.get("prompts", {}).get(task)}
            )
        for older in self.tables:
            if older not in written:
                older.unlink(missing_ok=True)
        self.tables = written
        return written


def add_to_results(
    results: dict[str, Any], info: CouplingInfo, members: Mapping[str, Sequence[str]]
) -> None:
    """One more metric per task and group, one more value per sample, and ``info`` as ``config.coupling``.

    Args:
        results: what `lm_eval.evaluate` returned.
        info: of this run, with its rows.
        members: leaf tasks of every group.
    """
    values = document_couplings(
        [row for row in info.rows if row.weights == TRAINED], info["headline_rank"]
    )
    names = [name for name in results["results"] if name not in members]
    for name, tasks in {**{name: [name] for name in names}, **members}.items():
        found = mean_and_error(value for key, value in values.items() if key.task in tasks)
        if found["n"]:
            _add_metric(results, name, found)
    for task, samples in (results.get("samples") or {}).items():
        for sample in samples:
            value = values.get(
                DocumentKey(task, sample["doc_hash"], sample["prompt_hash"]), math.nan
            )
            sample["coupling"] = None if math.isnan(value) else value
    results.setdefault("config", {})["coupling"] = info


def with_logged_ids(
    rows: Sequence[Row], results: Mapping[str, Any], chosen: Mapping[str, Sequence[int]]
) -> list[Row]:
    """The rows with the ``doc_id`` under which lm-eval logs their documents.

    Where ``--samples`` chose documents their requests are numbered anew, from 0, in the order of the data set.

    Args:
        rows: with the numbers of the requests.
        results: what `lm_eval.evaluate` returned, with or without samples.
        chosen: ``--samples``, numbers of documents for each task.

    Returns:
        As many rows, in their order.
    """
    logged = {
        DocumentKey(task, sample["doc_hash"], sample["prompt_hash"]): sample["doc_id"]
        for task, samples in (results.get("samples") or {}).items()
        for sample in reversed(samples)  # of equal documents the first
    }
    renumbered = {task: sorted(set(numbers)) for task, numbers in chosen.items() if numbers}
    found = []
    for row in rows:
        numbers = renumbered.get(row.document.task)
        own = numbers[row.doc_id] if numbers and row.doc_id < len(numbers) else row.doc_id
        found.append(replace(row, doc_id=logged.get(row.document, own)))
    return found


def _add_metric(results: dict[str, Any], name: str, found: Mapping[str, float]) -> None:
    stderr = found["stderr"] if found["n"] > 1 else "N/A"
    for column in ("results", "groups"):
        if name in results.get(column, {}):
            results[column][name].update(
                {"coupling,none": found["mean"], "coupling_stderr,none": stderr}
            )
    results.setdefault("higher_is_better", {}).setdefault(name, {})["coupling"] = True
