"""The values of a run, put where lm-eval looks for them: its results, its samples, and tables beside both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.measuring.rows import TRAINED, DocumentKey, Row, document_couplings
from lm_eval_coupling.measuring.summary import mean_and_error
from lm_eval_coupling.saved.tables import write_tables


class CouplingInfo(dict):
    """What the results say under ``config.coupling``; carries the rows until whoever saves the results writes the tables.

    lm-eval hands its results on as plain dictionaries, from an evaluation to a tracker that may be made much later.
    """

    def __init__(self, facts: Mapping[str, Any], rows: Sequence[Row] = (), out: Path | None = None) -> None:
        """Keep ``rows`` for the tables, which go to ``out`` where that is given."""
        super().__init__(facts)
        self.rows = rows
        self.out = out
        self.tables: list[Path] = []

    def write_tables(self, folder: Path | None, date: str) -> list[Path]:
        """Write the tables into ``coupling_out``, else into ``folder``; nowhere if there is neither.

        A run has its tables once: those written before, under an earlier date, are replaced.
        """
        folder = self.out or folder
        if folder is None or not self.rows:
            return []
        written = write_tables([row.to_columns() for row in self.rows], folder, date, self)
        for older in self.tables:
            if older not in written:
                older.unlink(missing_ok=True)
        self.tables = written
        return written


def add_to_results(results: dict[str, Any], info: CouplingInfo, members: Mapping[str, Sequence[str]]) -> None:
    """One more metric per task and group, one more value per sample, and ``info`` as ``config.coupling``.

    Args:
        results: what `lm_eval.evaluate` returned.
        info: of this run, with its rows.
        members: leaf tasks of every group.
    """
    values = document_couplings([row for row in info.rows if row.weights == TRAINED], info["headline_rank"])
    names = [name for name in results["results"] if name not in members]
    for name, tasks in {**{name: [name] for name in names}, **members}.items():
        found = mean_and_error(value for key, value in values.items() if key.task in tasks)
        if found["n"]:
            _add_metric(results, name, found)
    for task, samples in (results.get("samples") or {}).items():
        for sample in samples:
            value = values.get(DocumentKey(task, sample["doc_hash"], sample["prompt_hash"]), math.nan)
            sample["coupling"] = None if math.isnan(value) else value
    results.setdefault("config", {})["coupling"] = info


def _add_metric(results: dict[str, Any], name: str, found: Mapping[str, float]) -> None:
    stderr = found["stderr"] if found["n"] > 1 else "N/A"
    for column in ("results", "groups"):
        if name in results.get(column, {}):
            results[column][name].update({"coupling,none": found["mean"], "coupling_stderr,none": stderr})
    results.setdefault("higher_is_better", {}).setdefault(name, {})["coupling"] = True
