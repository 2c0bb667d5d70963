"""A saved run: the results, coupling tables and samples that belong together.

Everything that shows or compares runs starts from :func:`find_runs`, which reads results and the
metadata of tables. Rows are read later, and only the columns that are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.names import ends_with
from lm_eval_coupling.saved.precedence import takes_place
from lm_eval_coupling.saved.prompting import (
    describe_prompting,
    evaluated_documents,
    model_arguments,
)
from lm_eval_coupling.saved.results_file import COUPLING, number, read_results, require_shape
from lm_eval_coupling.saved.run_files import date_in, list_run_files
from lm_eval_coupling.saved.saved_table import SavedTable, has_equal_rows
from lm_eval_coupling.saved.tables import UNTRAINED, read_header
from lm_eval_coupling.saved.what_was_run import WhatWasRun

logger = logging.getLogger(__name__)

# Arguments of the model, besides its name and revision, that make other weights or arithmetic.
_VARIANTS = (
    *("peft", "delta", "dtype", "load_in_8bit", "load_in_4bit"),
    *("mixed_precision_dtype", "softmax_dtype"),
)
# Arguments that become part of the model's name: a checkpoint is known by its folder.
_WITHIN = ("subfolder", "gguf_file")


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """An evaluation of one model.

    Attributes:
        file: its results; None where only tables are there.
        results: the content of ``file``, of the shape that lm-eval writes, or empty.
        tables: its coupling tables, one per single task.
        documents: digests of the documents of tasks of which a run beside it has others.
    """

    file: Path | None
    results: Mapping[str, Any]
    tables: tuple[SavedTable, ...]
    documents: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def coupling(self) -> Mapping[str, Any]:
        """Settings, versions and summaries of its coupling; empty where it was only scored."""
        return self._config.get("coupling") or (self.tables[0].about if self.tables else {})

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.results.get("config") or {}

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any]:
        """The model arguments that lm-eval was given."""
        return model_arguments(self.results)

    @functools.cached_property
    def model(self) -> str:
        """Name or path, with the folder or file within it that the weights are of."""
        name = (
            self.results.get("model_name")
            or self.coupling.get("model")
            or self.arguments.get("pretrained")
        )
        name = str(name or (self.file or self.tables[0].file).parent.name)
        name = re.sub("/{2,}", "/", name).rstrip("/") or name  # a path is typed in several ways
        given = [self.arguments.get(key) for key in _WITHIN]  # perhaps a folder named 0
        within = [str(part).strip("/") for part in given if part is not None and part != ""]
        if not within:
            return name
        return "/".join([name.rstrip("/"), *(part for part in within if not ends_with(name, part))])

    @property
    def revision(self) -> str:
        """The revision of the model on the hub; ``main`` where there is none."""
        # lm-eval records the revision that was asked for even for a folder, which has none.
        return str(self.coupling.get("revision") or self._config.get("model_revision") or "main")

    @property
    def variant(self) -> str:
        """Further arguments that make other weights or arithmetic, such as ``peft=…``.

        ``dtype=…`` is one only where no type is known that the model ran in.
        """
        plain = (None, "", "False", "None")
        given = {key: self.arguments.get(key) for key in _VARIANTS}
        given |= {key: str(v).removeprefix("torch.") for key, v in given.items() if v is not None}
        if self.dtype or given["dtype"] == "auto":
            given["dtype"] = None
        return ", ".join(f"{key}={value}" for key, value in given.items() if value not in plain)

    @property
    def dtype(self) -> str:
        """Type of the numbers that the model ran in, such as ``bfloat16``; "" if unknown."""
        given = self.coupling.get("model_dtype") or self._config.get("model_dtype") or ""
        return str(given).removeprefix("torch.")

    @property
    def fingerprint(self) -> str | None:
        """Digest of the weights; None where only scores were taken."""
        return self.coupling.get("fingerprint")

    @property
    def date(self) -> str:
        """lm-eval's date in the names of the run's files, "" where there is none."""
        return date_in(self.file) if self.file else str(self.tables[0].about.get("date") or "")

    @functools.cached_property
    def time(self) -> float:
        """Seconds since the epoch: lm-eval's ``date``, else the names' date taken as UTC.

        Dates in names are local times without a zone, which a clock that is put back repeats.
        """
        seconds = number(self.results.get("date"))
        if math.isfinite(seconds):
            return seconds
        day, _, clock = self.date.partition("T")
        with contextlib.suppress(ValueError):
            when = datetime.datetime.fromisoformat(f"{day}T{clock.replace('-', ':')}+00:00")
            return when.timestamp()
        return -math.inf

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that coupling was measured with; empty where it was not."""
        return self.coupling.get("settings") or {}

    @functools.cached_property
    def leaves(self) -> Mapping[str, list[str]]:
        """The single tasks of each group."""
        return leaf_tasks(self.results.get("group_subtasks") or {})

    @functools.cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The groups that each task or group is directly in; it may be in several."""
        groups: dict[str, tuple[str, ...]] = {}
        for group, members in (self.results.get("group_subtasks") or {}).items():
            for member in dict.fromkeys(members or ()):
                groups[member] = (*groups.get(member, ()), group)
        return groups

    def prompting(self, task: str) -> str:
        """Describe how the prompts and answers of a task or group were made."""
        return self.what_was_run(task).prompting

    def what_was_run(self, task: str) -> WhatWasRun:
        """Return what decides the numbers of a task or group; derived once."""
        if task not in self._what_was_run:
            members = self.leaves.get(task)
            self._what_was_run[task] = WhatWasRun(
                model=self.model,
                revision=self.revision,
                variant=self.variant,
                dtype=self.dtype,
                fingerprint=self.fingerprint,
                task=task,
                prompting=describe_prompting(
                    self.results,
                    members or [task],
                    self._about(task),
                    self.documents,
                    group=task if members else "",
                ),
            )
        return self._what_was_run[task]

    def _about(self, task: str) -> Mapping[str, Any]:
        """Return what says how a task was prompted: a table alone says it of its own task."""
        table = None if self.file else self.table(task)
        return self.coupling if table is None else table.about

    def evaluated_documents(self) -> Iterator[tuple[tuple[Any, ...], str]]:
        """Yield scope and digest of the documents of each single task, as far as they are known.

        Scopes are those of :func:`~.prompting.evaluated_documents`, after the task.
        """
        tasks = [task for task in self.results.get("results", {}) if not self.leaves.get(task)]
        for task in dict.fromkeys([*tasks, *(table.task for table in self.tables)]):
            known = evaluated_documents(self.results, task, self._about(task))
            if known is not None:
                yield (task, *known[0]), known[1]

    @functools.cached_property
    def _what_was_run(self) -> dict[str, WhatWasRun]:
        return {}

    @functools.cached_property
    def _table_of_task(self) -> Mapping[str, SavedTable]:
        return {table.task: table for table in reversed(self.tables)}

    def table(self, task: str) -> SavedTable | None:
        """Return the coupling table of a single task, if there is one."""
        return self._table_of_task.get(task)

    def samples(self, task: str) -> Path | None:
        """Return where lm-eval writes the samples of a single task; the file may not be there."""
        return self.file.parent / f"samples_{task}_{self.date}.jsonl" if self.file else None


@dataclasses.dataclass(frozen=True)
class SavedRuns:
    """Runs in the order of their folders and dates, and sentences on what was passed over."""

    runs: tuple[SavedRun, ...]
    passed_over: tuple[str, ...]

    def with_tables(self) -> list[tuple[SavedRun, SavedTable]]:
        """Return every table with its run, in the order of the tables' files."""
        pairs = [(run, table) for run in self.runs for table in run.tables]
        return sorted(pairs, key=lambda pair: pair[1].file)

    def newest_tables(self) -> list[tuple[SavedRun, SavedTable]]:
        """Return for each folder, weights, prompts and task the one table that counts."""
        latest: dict[tuple[Any, ...], tuple[SavedRun, SavedTable]] = {}
        for run, table in sorted(self.with_tables(), key=lambda pair: pair[0].time):
            key = (table.file.parent, run.what_was_run(table.task))
            if key not in latest or takes_place(table.standing, latest[key][1].standing):
                latest[key] = (run, table)
        return _without_equal_tables(sorted(latest.values(), key=lambda pair: pair[1].file))


def _without_equal_tables(
    pairs: Sequence[tuple[SavedRun, SavedTable]],
) -> list[tuple[SavedRun, SavedTable]]:
    """Keep the first of tables of the same run and prompting that have equal rows.

    Copies byte by byte are not listed at all. The bytes of these differ, as other software wrote
    them again. Tables without the id of their run are kept.

    Returns:
        The pairs that are kept, in the order of the tables' files.
    """
    kept: dict[tuple[Any, ...], list[tuple[SavedRun, SavedTable]]] = {}
    for run, table in pairs:
        key = (table.about.get("run_id"), table.about.get("date"), run.what_was_run(table.task))
        others = kept.setdefault(key, [])
        equal = [other for _, other in others if key[0] and has_equal_rows(table, other)]
        if equal:
            logger.warning("passed over: got %s, a copy of %s", table.file, equal[0].file)
        else:
            others.append((run, table))
    return sorted((pair for same in kept.values() for pair in same), key=lambda p: p[1].file)


def find_runs(paths: Path | str | Iterable[Path | str]) -> SavedRuns:
    """Find everything that was saved at ``paths``: folders, result files or coupling tables.

    A table belongs to the results of its ``run_id``, or else to those of its date in its folder.
    A file that cannot be read, or is not of the shape that a run writes, is named and passed over.

    Returns:
        The runs, and in words what was passed over (:func:`~.run_files.list_run_files`).

    Raises:
        CouplingError: if a path does not exist, or a file that was named itself cannot be read.
    """
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    listed = list_run_files(roots)
    passed_over = list(listed.passed_over)
    results: list[tuple[Path, dict[str, Any]]] = []
    tables: list[SavedTable] = []
    for file in listed.files:
        try:
            if file.suffix == ".parquet":
                about, columns, is_verified = read_header(file)
                require_shape(file, about, COUPLING | {"task": "a text"})
                tables.append(SavedTable(file, about, columns))
                if not is_verified:
                    passed_over.append(
                        f"got {file}, which other software wrote again: no checksum says whether "
                        "its rows are those of the run"
                    )
            else:
                results.append((file, read_results(file)))
        except CouplingError as error:
            if file in roots:
                raise
            passed_over.append(str(error))
    runs = tuple(_with_differing_documents([*_join(results, _with_twins(tables))]))
    return SavedRuns(runs, (*passed_over, *_contradictions(runs)))


def _with_differing_documents(runs: Sequence[SavedRun]) -> Iterator[SavedRun]:
    """Yield the runs, with digests of the tasks of which they evaluated different documents.

    Digests of runs of the same documents, or of another number of them, say nothing.
    """
    known: dict[tuple[Any, ...], dict[str, list[int]]] = {}
    for place, run in enumerate(runs):
        for scope, digest in run.evaluated_documents():
            known.setdefault(scope, {}).setdefault(digest, []).append(place)
    differing: dict[int, dict[str, str]] = {}
    for (task, *_), by_digest in known.items():
        for digest, places in by_digest.items() if len(by_digest) > 1 else ():
            for place in places:
                differing.setdefault(place, {})[task] = digest
    for place, run in enumerate(runs):
        documents = differing.get(place)
        yield dataclasses.replace(run, documents=documents) if documents else run


def _contradictions(runs: Iterable[SavedRun]) -> Iterator[str]:
    """Yield a sentence for each summary in results that is not the one in its task's table.

    Results have no checksum; a table, which holds the same summary, has.
    """
    for run in [run for run in runs if run.file]:
        summaries = run.coupling.get("tasks") or {}
        for table in run.tables:
            own = (table.about.get("tasks") or {}).get(table.task)
            if own and table.task in summaries and summaries[table.task] != own:
                yield (
                    f"got {run.file} with another summary of {table.task} than {table.file.name}; "
                    "one of both was changed after the run: copy them again or measure again"
                )


def _with_twins(tables: Sequence[SavedTable]) -> list[SavedTable]:
    """Attach the tables of untrained weights to those of the trained ones beside them."""

    def key(table: SavedTable) -> tuple[Any, ...]:
        return table.file.parent, table.about.get("run_id"), table.about.get("date"), table.task

    twins = {key(table): table for table in tables if table.about.get("weights") == UNTRAINED}
    trained = [table for table in tables if table.about.get("weights") != UNTRAINED]
    paired = [
        dataclasses.replace(t, twin=twins.pop(key(t)).file) if key(t) in twins else t
        for t in trained
    ]
    return [*paired, *twins.values()]


def _join(
    results: Sequence[tuple[Path, dict[str, Any]]], tables: Sequence[SavedTable]
) -> Iterator[SavedRun]:
    """Join tables with the results that they belong to; other tables are runs without results."""
    by_run = {run_id: n for n, (_, run) in enumerate(results) if (run_id := _run_id(run))}
    by_date = {(file.parent, date_in(file)): n for n, (file, _) in enumerate(results)}
    own: dict[int, list[SavedTable]] = {}
    alone: dict[tuple[Any, ...], list[SavedTable]] = {}
    for table in tables:
        about, folder = table.about, table.file.parent
        run_id, date = about.get("run_id"), about.get("date")
        # The results beside the table go first: the run may have been copied.
        position = by_date.get((folder, date)) if date else None
        if position is None or _run_id(results[position][1]) != run_id:
            position = by_run.get(run_id) if run_id else position
        if position is not None:
            own.setdefault(position, []).append(table)
        else:
            key = (folder, run_id, date, about.get("model"), about.get("revision"))
            alone.setdefault(key, []).append(table)
    for position, (file, run) in enumerate(results):
        yield SavedRun(file, run, tuple(own.get(position, ())))
    for members in alone.values():
        yield SavedRun(None, {}, tuple(members))


def _run_id(run: Mapping[str, Any]) -> str | None:
    return ((run.get("config") or {}).get("coupling") or {}).get("run_id")


def leaf_tasks(subtasks: Mapping[str, Sequence[str] | None]) -> dict[str, list[str]]:
    """Return the single tasks of each group, through groups of groups, each once and in order."""
    leaves: dict[str, list[str]] = {}
    for group in [group for group, members in subtasks.items() if members]:
        # Every group is visited once, however many ways or circles lead to it.
        stack, visited, leaves[group] = [group], set(), []
        while stack:
            name = stack.pop()
            if name not in visited:
                visited.add(name)
                members = subtasks.get(name) or ()
                stack += reversed(members)
                leaves[group] += [] if members else [name]
    return leaves
