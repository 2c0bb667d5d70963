"""What the page shows, as one JSON-able dict: ``rows`` of the table, ``tables`` of documents, ``provenance`` of runs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.prompts import describe_table
from lm_eval_coupling.saved.names import labels, run_label
from lm_eval_coupling.saved.results import is_score, leaf_tasks, load_runs
from lm_eval_coupling.saved.samples import read_answers
from lm_eval_coupling.saved.tables import find_tables, load_records

DOCUMENTS = 200
_DOCUMENTS_IN_ALL = 4000
_DIGITS = 6
_FACTS = ("model", "revision", "task", "alias", "n_fewshot", "n_samples", "date", "dtype", "fingerprint")
_FACTS += ("n_params", "n_layers", "d_model", "coupling_rank", "worst_certificate", "measured", "failed")
_REGULARITY = ("line_shape_score", "expodistance")


def gather(paths: Path | str | Iterable[Path | str], *, documents: int = DOCUMENTS, mixed: str = "refuse") -> dict[str, Any]:
    """Read saved runs; arguments and errors are those of :func:`~lm_eval_coupling.report.write_report`.

    Numbers are those of :func:`~lm_eval_coupling.saved.results.load_runs`, with six digits; what is undefined is ``None``.
    """
    if documents < 0:
        raise CouplingError(f"got documents={documents}, expected a whole number that is not negative")
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    found = load_runs(roots, mixed=mixed).to_dict("records")
    if not found:
        raise CouplingError(f"got {', '.join(map(str, roots))}, whose results have no task; evaluate one first")
    runs = {file: _Run.read(file) for file in dict.fromkeys(row["file"] for row in found)}
    tables = _Tables(roots)
    names = _names(row["model"] for row in found)
    rows = [
        _row(row, runs[row["file"]], tables)
        | {"label": run_label(names[row["model"]], row["revision"]), "run": list(runs).index(row["file"])}
        for row in found
    ]
    return _plain(
        {"rows": rows, "provenance": [run.provenance() for run in runs.values()]} | tables.describe(documents),
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """One results file of lm-eval."""

    file: Path
    results: dict[str, Any]

    @classmethod
    def read(cls, file: str) -> _Run:
        return cls(Path(file), json.loads(Path(file).read_text(encoding="utf-8")))

    @property
    def coupling(self) -> dict[str, Any]:
        return (self.results.get("config") or {}).get("coupling") or {}

    @property
    def subtasks(self) -> dict[str, list[str]]:
        return self.results.get("group_subtasks") or {}

    def leaves(self, task: str) -> list[str]:
        return leaf_tasks(self.subtasks).get(task) or [task]

    def is_member(self, task: str) -> bool:
        return any(task in members for members in self.subtasks.values())

    def main_score(self, task: str) -> str | None:
        """The metric that lm-eval lists first."""
        return next((name for name in self.results["results"][task] if is_score(name)), None)

    def provenance(self) -> dict[str, Any]:
        """Settings, versions and device, and what lm-eval says of the run itself."""
        about = {name: value for name, value in self.coupling.items() if name != "tasks"}
        reasons = {task: found["reasons"] for task, found in self.coupling.get("tasks", {}).items() if found.get("reasons")}
        lm_eval = {name: self.results.get(name) for name in ("lm_eval_version", "transformers_version", "git_hash")}
        return {"file": f"{self.file.parent.name}/{self.file.name}"} | about | {"reasons": reasons, "lm_eval": lm_eval}


class _Tables:
    """The coupling tables at ``roots``, numbered as the rows ask for them."""

    def __init__(self, roots: Sequence[Path]) -> None:
        folders = [root if root.is_dir() else root.parent for root in roots]
        self._files = {
            _table_key(about, about["task"], about["date"]): (file, about)
            for folder in folders
            if next(folder.rglob("coupling_*.parquet"), None)
            for file, about in find_tables(folder, newest=False)
        }
        self._wanted: dict[tuple[Any, ...], tuple[_Run, str, str]] = {}

    def numbers(self, run: _Run, task: str, date: str) -> list[int]:
        """Of the tables of a task, or of all tasks of a group."""
        keys = {_table_key(run.coupling, leaf, date): leaf for leaf in run.leaves(task)}
        present = {key: leaf for key, leaf in keys.items() if key in self._files}
        for key, leaf in present.items():
            self._wanted.setdefault(key, (run, leaf, date))
        order = list(self._wanted)
        return [order.index(key) for key in present]

    def describe(self, documents: int) -> dict[str, Any]:
        limit = _limit([pq.read_metadata(self._files[key][0]).num_rows for key in self._wanted], documents)
        described = []
        for key, (run, task, date) in self._wanted.items():
            file, about = self._files[key]
            samples = run.file.parent / f"samples_{task}_{date}.jsonl"
            answers = read_answers(samples, run.main_score(task))
            described.append({"task": task} | describe_table(load_records(file), about, answers, limit))
        return {"tables": described, "limit": limit}


def _limit(sizes: Sequence[int], documents: int) -> int:
    """The most prompts of each table, at most ``documents``, with which the page holds no more than it can."""
    fitting = [n for n in range(documents + 1) if sum(min(size, n) for size in sizes) <= _DOCUMENTS_IN_ALL]
    return max(fitting, default=0) or min(1, documents)


def _table_key(coupling: Mapping[str, Any], task: str, date: str) -> tuple[Any, ...]:
    return coupling.get("run_id"), coupling.get("model"), coupling.get("revision"), task, date


def _row(row: Mapping[str, Any], run: _Run, tables: _Tables) -> dict[str, Any]:
    scores = {name: [row[name], row.get(_stderr(name))] for name in row if is_score(name) and math.isfinite(row[name])}
    task = row["task"]
    return {name: row[name] for name in _FACTS} | {
        "group": row["is_group"],
        "member": run.is_member(task),
        "scores": scores,
        "main": run.main_score(task),
        "coupling": {rank: _at_rank(row, rank) for rank in _ranks(row)},
        "regularity": {name: [row.get(name), row.get(f"{name}_stderr")] for name in _REGULARITY},
        "tables": tables.numbers(run, task, row["date"]),
    }


def _stderr(name: str) -> str:
    return name.replace(",", "_stderr,", 1)


def _ranks(row: Mapping[str, Any]) -> list[int]:
    ranks = [re.fullmatch(r"coupling@(\d+)", str(name)) for name in row]
    return sorted(int(rank[1]) for rank in ranks if rank and math.isfinite(row[rank[0]]))


def _at_rank(row: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """``chance`` as a coupling, so that it compares with ``mean``."""
    return {
        "mean": row[f"coupling@{rank}"],
        "stderr": row[f"coupling_stderr@{rank}"],
        "n": row[f"coupling_n@{rank}"],
        "chance": 1 - row[f"chance@{rank}"],
        "excess": row[f"coupling_excess@{rank}"],
    }


def _names(models: Iterable[str]) -> dict[str, str]:
    """Names of the models to read: of a local folder only as much as tells it from the others."""
    return {model: label if _is_local(model) else model for model, label in labels(models).items()}


def _is_local(model: str) -> bool:
    return bool(re.match(r"[./~\\]|[A-Za-z]:[\\/]", model))


def _plain(value: Any) -> Any:
    """JSON-able, with six digits; NaN and infinities, which JSON lacks, as ``None``."""
    if isinstance(value, Mapping):
        return {str(name): _plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")
    return value if value is None or isinstance(value, bool | int) else str(value)
