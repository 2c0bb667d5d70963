"""Data of the report's page: rows of the overview, tables of documents, provenance of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.palette import CATEGORIES
from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.measures.registry import Reading, prompt_readings
from lm_eval_coupling.report.table_numbers import PromptColumns, table_numbers
from lm_eval_coupling.report.task_table import TableView, view_table
from lm_eval_coupling.saved.names import full_names, label_rows
from lm_eval_coupling.saved.prompting import readable
from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun, find_runs
from lm_eval_coupling.saved.saved_table import SavedTable, passing_over
from lm_eval_coupling.saved.scores_table import require_results, rows_of_runs
from lm_eval_coupling.saved.strict_json import strict
from lm_eval_coupling.saved.task_rows import is_score
from lm_eval_coupling.saved.values import ranks_of
from lm_eval_coupling.saved.words import SavedWords, read_words

DOCUMENTS = 200  # prompts of each table
_DOCUMENTS_IN_ALL = 4000
_DIGITS = 6
_FACTS = (
    "model",
    "revision",
    "variant",
    "task",
    "alias",
    "n_fewshot",
    "n_samples",
    "date",
    "dtype",
    "fingerprint",
    "family",
    "n_params",
    "n_layers",
    "d_model",
    "coupling_rank",
    "measured",
    "failed",
)


def gather(
    paths: Path | str | Iterable[Path | str],
    *,
    documents: int = DOCUMENTS,
    mixed: str = "refuse",
    words: Path | str | None = None,
) -> dict[str, Any]:
    """Read saved runs; arguments are those of :func:`~lm_eval_coupling.report.page.write_report`.

    Returns:
        All that the page shows, ready for JSON: ``rows``, ``tables``, ``limit``, ``chance``,
        ``readings``, ``provenance``, ``passed_over`` and ``palette``. Numbers are those of
        :func:`~lm_eval_coupling.saved.scores_table.load_runs` with six digits; undefined is None.

    Raises:
        CouplingError: as there.
    """
    if documents < 0:
        raise CouplingError(
            f"got documents={documents}, expected a whole number that is not negative"
        )
    saved_words = None if words is None else read_words(words)
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    runs = find_runs(roots)
    require_results(runs, roots)
    scores = rows_of_runs(runs.runs, mixed=mixed)
    if scores.empty:
        raise CouplingError(
            f"got {', '.join(map(str, roots))}, whose results have no task; evaluate one first"
        )
    by_file = {str(run.file): run for run in runs.runs}
    numbers = {file: number for number, file in enumerate(dict.fromkeys(scores["file"]))}
    members = {file: _group_members(by_file[file]) for file in numbers}
    promptings = scores.groupby("task")["prompting"].unique()
    labels = label_rows(scores, full_names(scores["model"].unique()))
    tables = _Tables()
    rows = []
    for label, row in zip(labels, scores.to_dict("records"), strict=True):
        task, file = row["task"], row["file"]
        rows.append(
            _describe_row(row)
            | {"label": label, "run": numbers[file], "member": task in members[file]}
            | {"prompting": readable(row["prompting"], promptings[task])}
            | {"tables": tables.number(by_file[file], task)}
        )
    problems = list(runs.passed_over)
    described = tables.describe(documents, saved_words, problems)
    positions = {number: at for at, number in enumerate(described.pop("numbers"))}
    for row in rows:
        row["tables"] = [positions[number] for number in row["tables"] if number in positions]
    if saved_words is not None:
        _require_words(saved_words, described["tables"])
    data = {
        "rows": rows,
        "chance": _chance(rows),
        "provenance": [_provenance(by_file[file]) for file in numbers],
        "passed_over": problems,
        "palette": CATEGORIES,
        "readings": _readings(scores.columns),
    }
    return strict(data | described, _round)


def _group_members(run: SavedRun) -> set[str]:
    groups = run.results.get("group_subtasks") or {}
    return {task for members in groups.values() for task in members or ()}


def _require_words(words: SavedWords, tables: Iterable[Mapping[str, Any]]) -> None:
    if not any("words" in document for table in tables for document in table["documents"]):
        raise CouplingError(
            f"got {words.file} with words of {len(words.directions)} prompts, none of them on this "
            "page; make it with analysis/words.py and --results of one of these runs, or include "
            "more with --documents"
        )


def _readings(columns: Iterable[str]) -> list[dict[str, Any]]:
    """Describe the readings other than coupling that a run has."""
    names = {str(name).partition("@")[0] for name in columns} - {"coupling"}
    fields = ("name", "label", "of_rank", "sign", "doc")
    return [
        {field: getattr(reading, field) for field in fields}
        for reading in prompt_readings()
        if reading.name in names
    ]


def _chance(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Return the coupling of unrelated layers at every rank of the rows."""
    return {
        rank: chance_coupling(rank) for rank in sorted({r for row in rows for r in row["coupling"]})
    }


def _provenance(run: SavedRun) -> dict[str, Any]:
    """Return settings, versions and device, and lm-eval's versions."""
    assert run.file is not None  # require_results refuses runs without results
    tasks = run.coupling.get("tasks", {}).items()
    reasons = {task: summary["reasons"] for task, summary in tasks if summary.get("reasons")}
    versions = ("lm_eval_version", "transformers_version", "git_hash")
    return (
        {"file": f"{run.file.parent.name}/{run.file.name}"}
        | {name: value for name, value in run.coupling.items() if name != "tasks"}
        | {"reasons": reasons, "lm_eval": {name: run.results.get(name) for name in versions}}
    )


class _Tables:
    """The coupling tables of the runs, numbered in the order in which rows use them."""

    def __init__(self) -> None:
        self._numbers: dict[Path, int] = {}
        self._tables: list[tuple[SavedRun, SavedTable]] = []

    def number(self, run: SavedRun, task: str) -> list[int]:
        """Return the numbers of a task's table, or of those of a group's tasks."""
        numbers = []
        for leaf in run.leaves.get(task) or [task]:
            if (table := run.table(leaf)) is None:
                continue
            if table.file not in self._numbers:
                self._numbers[table.file] = len(self._tables)
                self._tables.append((run, table))
            numbers.append(self._numbers[table.file])
        return numbers

    def describe(
        self, documents: int, words: SavedWords | None, problems: list[str]
    ) -> dict[str, Any]:
        """Describe each table that can be read.

        Args:
            documents: the most prompts of a table.
            words: of the directions of prompts.
            problems: sentences on what cannot be read are added.

        Returns:
            ``tables``, their ``numbers``, and the ``limit`` of prompts of each.
        """
        room, views = _Room(documents), dict[int, TableView]()

        def read() -> Iterator[tuple[int, PromptColumns]]:
            for number, (run, table) in enumerate(self._tables):
                metric = _main_metric(run.results["results"].get(table.task, {}))
                answers = answers_of_run(run, table.task, metric, problems)
                with passing_over(problems):
                    view = views[number] = view_table(table, answers, room.limit, words)
                    room.add(view.shown)
                    yield number, view.columns

        described = {
            number: {"task": self._tables[number][1].task} | views.pop(number).describe(numbers)
            for number, numbers in table_numbers(read())
        }
        return {"tables": [*described.values()], "numbers": [*described], "limit": room.limit}


class _Room:
    """Room for prompts on the page, which tables share.

    Args:
        documents: the most prompts of a table.
    """

    def __init__(self, documents: int) -> None:
        self.limit = documents
        self._tables: list[dict[str, Any]] = []
        self._prompts = 0

    def add(self, table: dict[str, Any]) -> None:
        """Add a table; all tables lose ``documents`` beyond the new limit if they are too many."""
        self._tables.append(table)
        self._prompts += min(table["total"], self.limit)
        while self._prompts > _DOCUMENTS_IN_ALL and self.limit > 1:
            self.limit -= 1
            for each in self._tables:
                del each["documents"][self.limit :]
            self._prompts = sum(min(each["total"], self.limit) for each in self._tables)


def _main_metric(metrics: Iterable[str]) -> str | None:
    """Return the metric that lm-eval lists first."""
    return next(filter(is_score, metrics), None)


def _describe_row(row: Mapping[str, Any]) -> dict[str, Any]:
    ranks = _ranks(row)
    return {name: row[name] for name in _FACTS} | {
        "group": row["is_group"],
        "main": row["metric"],
        "scores": {
            name: [row[name], row.get(name.replace(",", "_stderr,", 1))]
            for name in row
            if is_score(name) and math.isfinite(row[name])
        },
        "coupling": {
            rank: {
                "mean": row[f"coupling@{rank}"],
                "stderr": row[f"coupling_stderr@{rank}"],
                "n": row[f"coupling_n@{rank}"],
                "chance": row[f"chance@{rank}"],
                "excess": row[f"coupling_excess@{rank}"],
            }
            for rank in ranks
        },
        "readings": {
            reading.name: _means_by_rank(row, reading, ranks) for reading in prompt_readings()
        },
    }


def _means_by_rank(
    row: Mapping[str, Any], reading: Reading, ranks: Sequence[int]
) -> dict[int | str, list[float | None]]:
    """Return ``[mean, standard error]`` of a reading at every rank K that has a mean.

    A reading without ranks has one entry, under the key "".
    """
    values = {}
    for key in ranks if reading.of_rank else [""]:
        suffix = f"@{key}" if reading.of_rank else ""
        mean = row.get(f"{reading.name}{suffix}")
        if mean is not None and math.isfinite(mean):
            values[key] = [mean, row.get(f"{reading.name}_stderr{suffix}")]
    return values


def _ranks(row: Mapping[str, Any]) -> list[int]:
    return sorted(rank for rank in ranks_of(row) if math.isfinite(row[f"coupling@{rank}"]))


def _round(number: float) -> float | int:
    """Keep six digits, in as few characters as possible."""
    return int(number) if number.is_integer() else float(f"{number:.{_DIGITS}g}")
