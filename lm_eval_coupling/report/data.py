"""What the page shows, as one JSON-able dict: ``rows`` of the table, ``tables`` of documents, ``provenance`` of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.palette import CATEGORIES
from lm_eval_coupling.measures.formulas.headline import chance_coupling, chance_level
from lm_eval_coupling.measures.registry import Reading, prompt_readings
from lm_eval_coupling.report.task_table import describe_table
from lm_eval_coupling.saved.names import full_names, label_rows
from lm_eval_coupling.saved.prompting import readable
from lm_eval_coupling.saved.samples import read_answers
from lm_eval_coupling.saved.saved_run import SavedRun, SavedTable, find_runs
from lm_eval_coupling.saved.scores_table import require_results, rows_of_runs
from lm_eval_coupling.saved.strict_json import strict
from lm_eval_coupling.saved.task_rows import is_score
from lm_eval_coupling.saved.words import SavedWords, read_words

DOCUMENTS = 200
_DOCUMENTS_IN_ALL = 4000
_DIGITS = 6
_FACTS: tuple[str, ...] = (
    "model",
    "revision",
    "variant",
    "task",
    "alias",
    "n_fewshot",
    "prompting",
    "n_samples",
    "date",
    "dtype",
)
_FACTS += ("fingerprint", "family")
_FACTS += ("n_params", "n_layers", "d_model", "coupling_rank", "measured", "failed")


def gather(
    paths: Path | str | Iterable[Path | str],
    *,
    documents: int = DOCUMENTS,
    mixed: str = "refuse",
    words: Path | str | None = None,
) -> dict[str, Any]:
    """Read saved runs; arguments are those of :func:`~lm_eval_coupling.report.write_report`.

    Returns:
        Everything that the page shows. Numbers are those of :func:`~lm_eval_coupling.saved.scores_table.load_runs`, with six
        digits; what is undefined is ``None``.

    Raises:
        CouplingError: as there.
    """
    if documents < 0:
        raise CouplingError(
            f"got documents={documents}, expected a whole number that is not negative"
        )
    told = None if words is None else read_words(words)
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    runs = find_runs(roots)
    require_results(runs, roots)
    found = rows_of_runs(runs.runs, mixed=mixed)
    if found.empty:
        raise CouplingError(
            f"got {', '.join(map(str, roots))}, whose results have no task; evaluate one first"
        )
    by_file = {str(run.file): run for run in runs.runs}
    used = {file: by_file[file] for file in dict.fromkeys(found["file"])}
    tables = _Tables()
    of_task = found.groupby("task")["prompting"].unique()
    rows = [
        _row(row, used[row["file"]], tables)
        | {"label": label, "run": list(used).index(row["file"])}
        | {"prompting": readable(row["prompting"], of_task[row["task"]])}
        for label, row in zip(
            label_rows(found, full_names(found["model"].unique())),
            found.to_dict("records"),
            strict=True,
        )
    ]
    about: dict[str, Any] = {"provenance": [_provenance(run) for run in used.values()]}
    about |= {"passed_over": runs.passed_over, "palette": CATEGORIES}
    about |= {"readings": _readings(found.columns)}
    described = tables.describe(documents, told)
    if told is not None and not any(
        "words" in one for table in described["tables"] for one in table["documents"]
    ):
        raise CouplingError(
            f"got {told.file} with words of {len(told.directions)} prompts, none of them on this page; make it with "
            "analysis/words.py and --results of one of these runs, or include more with --documents"
        )
    return strict({"rows": rows, "chance": _chance(rows)} | about | described, _short)


def _readings(columns: Iterable[str]) -> list[dict[str, Any]]:
    """The numbers of a prompt that some run has beside coupling, as the page names and draws them."""
    known = {str(name).partition("@")[0] for name in columns}
    return [
        {
            "name": reading.name,
            "label": reading.label,
            "of_rank": reading.of_rank,
            "sign": reading.sign,
        }
        for reading in prompt_readings()
        if reading.name in known and reading.name != "coupling"
    ]


def _chance(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Of coupling and of miscoupling, at every rank of the rows."""
    ranks = sorted({rank for row in rows for rank in row["coupling"]})
    return {
        rank: {"coupling": chance_coupling(rank), "miscoupling": chance_level(rank)}
        for rank in ranks
    }


def _provenance(run: SavedRun) -> dict[str, Any]:
    """Settings, versions and device, and what lm-eval says of the run itself."""
    about = {name: value for name, value in run.coupling.items() if name != "tasks"}
    reasons = {
        task: found["reasons"]
        for task, found in run.coupling.get("tasks", {}).items()
        if found.get("reasons")
    }
    lm_eval = {
        name: run.results.get(name)
        for name in ("lm_eval_version", "transformers_version", "git_hash")
    }
    assert run.file is not None  # a run without results has been refused
    return (
        {"file": f"{run.file.parent.name}/{run.file.name}"}
        | about
        | {"reasons": reasons, "lm_eval": lm_eval}
    )


def _main_score(run: SavedRun, task: str) -> str | None:
    """The metric that lm-eval lists first."""
    return next((name for name in run.results["results"][task] if is_score(name)), None)


class _Tables:
    """The coupling tables of the runs, numbered as the rows ask for them."""

    def __init__(self) -> None:
        self._wanted: dict[Path, tuple[SavedRun, SavedTable]] = {}

    def numbers(self, run: SavedRun, task: str) -> list[int]:
        """Of the tables of a task, or of all tasks of a group."""
        present = [table for leaf in run.leaves.get(task) or [task] if (table := run.table(leaf))]
        self._wanted |= {table.file: (run, table) for table in present}
        order = list(self._wanted)
        return [order.index(table.file) for table in present]

    def describe(self, documents: int, words: SavedWords | None) -> dict[str, Any]:
        """What the page shows of each."""
        limit = _limit([pq.read_metadata(file).num_rows for file in self._wanted], documents)
        described = []
        for run, table in self._wanted.values():
            answers = read_answers(run.samples(table.task), _main_score(run, table.task))
            described.append({"task": table.task} | describe_table(table, answers, limit, words))
        return {"tables": described, "limit": limit}


def _limit(sizes: Sequence[int], documents: int) -> int:
    """The most prompts of each table, at most ``documents``, with which the page holds no more than it can."""
    fitting = [
        n for n in range(documents + 1) if sum(min(size, n) for size in sizes) <= _DOCUMENTS_IN_ALL
    ]
    return max(fitting, default=0) or min(1, documents)


def _row(row: Mapping[str, Any], run: SavedRun, tables: _Tables) -> dict[str, Any]:
    scores = {
        name: [row[name], row.get(_stderr(name))]
        for name in row
        if is_score(name) and math.isfinite(row[name])
    }
    task = row["task"]
    return {name: row[name] for name in _FACTS} | {
        "group": row["is_group"],
        "member": any(
            task in members for members in (run.results.get("group_subtasks") or {}).values()
        ),
        "scores": scores,
        "main": _main_score(run, task),
        "coupling": {rank: _coupling(row, rank) for rank in _ranks(row)},
        "readings": {reading.name: _reading(row, reading) for reading in prompt_readings()},
        "tables": tables.numbers(run, task),
    }


def _reading(row: Mapping[str, Any], reading: Reading) -> dict[str | int, list[Any]]:
    """Mean and standard error by rank, or under "" where it has none."""
    at: dict[str | int, str] = (
        {rank: f"@{rank}" for rank in _ranks(row)} if reading.of_rank else {"": ""}
    )
    found = {
        key: (f"{reading.name}{end}", f"{reading.name}_stderr{end}") for key, end in at.items()
    }
    known = {key: (row.get(mean), row.get(error)) for key, (mean, error) in found.items()}
    return {
        key: [mean, error]
        for key, (mean, error) in known.items()
        if mean is not None and math.isfinite(mean)
    }


def _stderr(name: str) -> str:
    return name.replace(",", "_stderr,", 1)


def _ranks(row: Mapping[str, Any]) -> list[int]:
    ranks = [re.fullmatch(r"coupling@(\d+)", str(name)) for name in row]
    return sorted(int(rank[1]) for rank in ranks if rank and math.isfinite(row[rank[0]]))


def _coupling(row: Mapping[str, Any], rank: int) -> dict[str, Any]:
    return {
        "mean": row[f"coupling@{rank}"],
        "stderr": row[f"coupling_stderr@{rank}"],
        "n": row[f"coupling_n@{rank}"],
        "chance": row[f"chance@{rank}"],
        "excess": row[f"coupling_excess@{rank}"],
    }


def _short(number: float) -> float | int:
    """With six digits, and as few characters as may be."""
    return int(number) if number.is_integer() else float(f"{number:.{_DIGITS}g}")
