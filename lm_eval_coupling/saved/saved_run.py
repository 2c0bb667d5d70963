"""A saved run: lm-eval's results, the coupling tables and the samples that belong together, found once, read by columns.

Everything that shows or compares runs starts from :func:`find_runs`. Finding reads results and the tables' metadata;
rows are read when they are asked for, and only the columns that are named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.precedence import Standing, takes_place
from lm_eval_coupling.saved.prompting import model_arguments, prompting
from lm_eval_coupling.saved.tables import (
    UNTRAINED,
    frame_of,
    open_table,
    read_header,
    require_schema,
)

_DATE = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.(?:json|parquet)$")
# Arguments of the model, besides its name and revision, that make other weights of it.
_VARIANTS = ("subfolder", "gguf_file", "peft", "delta", "dtype", "load_in_8bit", "load_in_4bit")
_WITHIN = (
    "subfolder",
    "gguf_file",
)  # these are parts of the name itself: a checkpoint is told by its folder
_TABLES = ("coupling_", f"{UNTRAINED}_coupling_")  # what names of tables start with
_AT_ONCE = 64  # rows whose matrices are held together


@dataclasses.dataclass(frozen=True)
class SavedTable:
    """The coupling tables of one task of a run, read as one.

    Attributes:
        file: of the trained weights, or of all there are in tables from before twins had a file of their own.
        about: its provenance, as the run wrote it.
        columns: those that it has.
        twin: of the untrained weights, where they were measured.
    """

    file: Path
    about: Mapping[str, Any]
    columns: tuple[str, ...]
    twin: Path | None = None

    @property
    def task(self) -> str:
        """The task whose documents it holds."""
        return self.about["task"]

    @property
    def standing(self) -> Standing:
        """What it has beside other tables of its task."""
        summary = (self.about.get("tasks") or {}).get(self.task) or {}
        return Standing.of(self.about.get("settings") or {}, summary.get("measured", 0), math.nan)

    def _files(self, weights: str) -> list[Path]:
        """Those that may have rows of these weights; the first is there in any case, for its columns."""
        return [self.file, *([self.twin] if self.twin is not None and weights != "trained" else [])]

    def read(
        self,
        columns: Sequence[str] | None = None,
        *,
        weights: str = "trained",
        places: str = "first",
    ) -> pd.DataFrame:
        """All rows of some columns at once; see :meth:`batches`."""
        parts = []
        for file in self._files(weights):
            with open_table(file) as table:
                parts.append(
                    self._of(frame_of(table.read(self._wanted(columns))), columns, weights, places)
                )
        return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        weights: str = "trained",
        places: str = "first",
        rows: int = _AT_ONCE,
    ) -> Iterator[pd.DataFrame]:
        """The prompts of these weights, some rows at a time, at least one part, which may be empty.

        Args:
            columns: those to read, ``weights`` besides; those that the table lacks are left out. None: all.
            weights: ``trained``, ``untrained`` or ``all``.
            places: ``first``, of the tokens that a prompt was measured at, or ``all``.
            rows: at most so many at a time.

        Yields:
            A frame of the columns asked for.
        """
        wanted = self._wanted(columns)
        for file in self._files(weights):
            with open_table(file) as table:
                if file == self.file:
                    empty = table.schema_arrow.empty_table()
                    some = empty if wanted is None else empty.select(wanted)
                    yield self._of(frame_of(some), columns, weights, places)
                for batch in table.iter_batches(batch_size=rows, columns=wanted):
                    if len(part := self._of(frame_of(batch), columns, weights, places)):
                        yield part

    def _wanted(self, columns: Sequence[str] | None) -> list[str] | None:
        return (
            None
            if columns is None
            else [name for name in self.columns if name in (*columns, "weights", "place")]
        )

    def _of(
        self, rows: pd.DataFrame, columns: Sequence[str] | None, weights: str, places: str
    ) -> pd.DataFrame:
        # Tables from before there were twins do not say.
        rows["weights"] = (
            rows["weights"].fillna("trained")
            if "weights" in rows
            else pd.Series("trained", rows.index)
        )
        kept = pd.Series(True, rows.index) if weights == "all" else rows["weights"] == weights
        if places == "first" and "place" in rows:
            kept &= ~rows["place"].fillna(0).astype(bool)  # those that do not say have one
        if columns is not None and "place" not in columns:
            rows = rows.drop(columns="place", errors="ignore")
        return rows if kept.all() else rows[kept].reset_index(drop=True)


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One evaluation of one model. ``file`` and ``results`` are None and empty where only tables were found."""

    file: Path | None
    results: Mapping[str, Any]
    tables: tuple[SavedTable, ...]

    @functools.cached_property
    def coupling(self) -> Mapping[str, Any]:
        """What the run says of its coupling: settings, versions, summaries; empty where it was only scored."""
        return self._config.get("coupling") or (self.tables[0].about if self.tables else {})

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.results.get("config") or {}

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any]:
        """Those of the model, as they were given to lm-eval."""
        return model_arguments(self.results)

    @property
    def model(self) -> str:
        """Name or path, with the folder or file within it that the weights are of."""
        name = (
            self.results.get("model_name")
            or self.coupling.get("model")
            or self.arguments.get("pretrained")
        )
        name = str(name or (self.file or self.tables[0].file).parent.name)
        within = [str(self.arguments[key]).strip("/") for key in _WITHIN if self.arguments.get(key)]
        return (
            "/".join([name.rstrip("/"), *(part for part in within if not name.endswith(part))])
            if within
            else name
        )

    @property
    def revision(self) -> str:
        """Of the model on the hub; ``main`` where there is none."""
        # lm-eval has what was asked for, also of a folder, where transformers looks for none.
        return str(self.coupling.get("revision") or self._config.get("model_revision") or "main")

    @property
    def variant(self) -> str:
        """Further arguments that make other weights of the model, such as ``peft=…``; "" for none."""
        given = {key: self.arguments.get(key) for key in _VARIANTS if key not in _WITHIN}
        plain = {"dtype": ("auto", None, "")}
        return ", ".join(
            f"{key}={value}"
            for key, value in given.items()
            if value not in plain.get(key, (None, "", False))
        )

    @property
    def fingerprint(self) -> str | None:
        """Of the weights; None where only scores were taken."""
        return self.coupling.get("fingerprint")

    @property
    def date(self) -> str:
        """lm-eval's date of the run, "" where the file's name has none."""
        dated = _DATE.search(self.file.name) if self.file else None
        return (
            dated[1] if dated else "" if self.file else str(self.tables[0].about.get("date") or "")
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """How coupling was measured; empty where it was not."""
        return self.coupling.get("settings") or {}

    @functools.cached_property
    def leaves(self) -> Mapping[str, list[str]]:
        """The single tasks of each group."""
        return leaf_tasks(self.results.get("group_subtasks") or {})

    def prompting(self, task: str) -> str:
        """How the prompts of a task or group were made, in words that are equal where the prompts are."""
        return prompting(self.results, self.leaves.get(task) or [task], self._about(task))

    def _about(self, task: str) -> Mapping[str, Any]:
        """What a table says of its own task where there are no results."""
        table = self.table(task)
        return self.coupling if self.file or table is None else table.about

    def table(self, task: str) -> SavedTable | None:
        """The coupling table of a single task."""
        return next((table for table in self.tables if table.task == task), None)

    def samples(self, task: str) -> Path | None:
        """Where lm-eval wrote the samples of a single task, if it was asked to; the file may not be there."""
        return self.file.parent / f"samples_{task}_{self.date}.jsonl" if self.file else None


@dataclasses.dataclass(frozen=True)
class SavedRuns:
    """``runs``: in the order of their folders and dates; ``passed_over``: files that could not be read, a sentence each."""

    runs: tuple[SavedRun, ...]
    passed_over: tuple[str, ...]

    def with_tables(self) -> list[tuple[SavedRun, SavedTable]]:
        """Every table with its run, in the order of the tables' files."""
        return sorted(
            ((run, table) for run in self.runs for table in run.tables),
            key=lambda pair: pair[1].file,
        )

    def newest_tables(self) -> list[tuple[SavedRun, SavedTable]]:
        """Of the same weights, prompts and task in the same folder only the table that counts (precedence.py)."""
        latest: dict[tuple[Any, ...], tuple[SavedRun, SavedTable]] = {}
        for run, table in sorted(
            self.with_tables(), key=lambda pair: str(pair[1].about.get("date"))
        ):
            key = (table.file.parent, *identity(run), run.prompting(table.task), table.task)
            if key not in latest or takes_place(table.standing, latest[key][1].standing):
                latest[key] = (run, table)
        return sorted(latest.values(), key=lambda pair: pair[1].file)


def identity(run: SavedRun) -> tuple[str, str, str, str | None]:
    """Model, revision, variant and fingerprint: runs that differ in one of these are of different weights."""
    return run.model, run.revision, run.variant, run.fingerprint


def find_runs(paths: Path | str | Iterable[Path | str]) -> SavedRuns:
    """Find everything that was saved at ``paths``, folders searched recursively, result files or coupling tables.

    A table belongs to the results of its ``run_id``, or else to those of its date in its folder. A file that cannot be
    read is named and passed over, as is other people's JSON.

    Returns:
        The runs, and in words what was passed over.

    Raises:
        CouplingError: if a path does not exist, or a file that was named itself cannot be read.
    """
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    passed_over: list[str] = []
    results: list[tuple[Path, dict[str, Any]]] = []
    tables: list[SavedTable] = []
    seen: set[Path] = set()
    for root in roots:
        if not root.exists():
            raise CouplingError(
                f"got {root}, which does not exist; give folders that lm-eval wrote, or its result files"
            )
        for file in _with_its_own(root) if root.is_file() else _files(root):
            if (there := file.resolve()) in seen:  # of two paths, one may lead to the other
                continue
            seen.add(there)
            try:
                if file.suffix == ".parquet":
                    tables.append(SavedTable(file, *read_header(file)))
                elif (found := _results(file, named=file == root)) is not None:
                    results.append((file, found))
            except CouplingError as error:
                if file == root:
                    raise
                passed_over.append(str(error))
    return SavedRuns(tuple(_joined(results, _with_twins(tables))), tuple(passed_over))


def _with_twins(tables: Sequence[SavedTable]) -> list[SavedTable]:
    """The table of untrained weights belongs to that of the trained ones beside it; alone, it stands for itself."""

    def key(table: SavedTable) -> tuple[Any, ...]:
        return table.file.parent, table.about.get("run_id"), table.about.get("date"), table.task

    twins = {key(table): table for table in tables if table.about.get("weights") == "untrained"}
    own = [table for table in tables if table.about.get("weights") != "untrained"]
    paired = [
        dataclasses.replace(t, twin=twins.pop(key(t)).file) if key(t) in twins else t for t in own
    ]
    return [*paired, *twins.values()]


def _with_its_own(file: Path) -> Iterator[Path]:
    """Results with the tables of their date beside them, and the other way round."""
    yield file
    if dated := _DATE.search(file.name):
        yield from sorted(
            file.parent.glob(
                f"*_{dated[1]}.json"
                if file.suffix == ".parquet"
                else f"*coupling_*_{dated[1]}.parquet"
            )
        )


def _files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        # `--output_path NAME.json` makes NAME_<date>.json instead of results_<date>.json
        is_results = file.suffix == ".json" and (
            file.name.startswith("results") or _DATE.search(file.name)
        )
        if is_results or (file.suffix == ".parquet" and file.name.startswith(_TABLES)):
            yield file


def _results(file: Path, named: bool) -> dict[str, Any] | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, which is no readable results file ({why(error)}); remove it or run the evaluation again"
        ) from None
    if isinstance(run, dict) and isinstance(run.get("results"), dict):
        if isinstance(about := (run.get("config") or {}).get("coupling"), dict):
            require_schema(file, about)
        return run
    if named:
        raise CouplingError(
            f"got {file}, which has no results; expected a results_*.json that lm-eval wrote"
        )
    return None


def _joined(
    results: Sequence[tuple[Path, dict[str, Any]]], tables: Sequence[SavedTable]
) -> Iterator[SavedRun]:
    by_run = {id: number for number, (_, run) in enumerate(results) if (id := _run_id(run))}
    by_date = {
        (file.parent, d[1]): number
        for number, (file, _) in enumerate(results)
        if (d := _DATE.search(file.name))
    }
    own: dict[int, list[SavedTable]] = {}
    alone: dict[tuple[Any, ...], list[SavedTable]] = {}
    for table in tables:
        about, folder = table.about, table.file.parent
        number = by_date.get((folder, about.get("date")))  # first, as a run may have been copied
        if number is None or _run_id(results[number][1]) != about.get("run_id"):
            run_id = about.get("run_id")
            number = by_run.get(run_id) if run_id else number
        if number is not None:
            own.setdefault(number, []).append(table)
        else:
            key = (
                folder,
                about.get("run_id"),
                about.get("date"),
                about.get("model"),
                about.get("revision"),
            )
            alone.setdefault(key, []).append(table)
    for number, (file, run) in enumerate(results):
        yield SavedRun(file, run, tuple(own.get(number, ())))
    for members in alone.values():
        yield SavedRun(None, {}, tuple(members))


def _run_id(run: Mapping[str, Any]) -> str | None:
    return ((run.get("config") or {}).get("coupling") or {}).get("run_id")


def leaf_tasks(subtasks: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Leaf tasks of each group, through groups of groups."""

    def below(name: str, above: tuple[str, ...]) -> list[str]:
        children = [child for child in subtasks.get(name) or [] if child not in above]
        return (
            [leaf for child in children for leaf in below(child, (*above, name))]
            if children
            else [name]
        )

    return {
        name: list(dict.fromkeys(below(name, ())))
        for name, children in subtasks.items()
        if children
    }
