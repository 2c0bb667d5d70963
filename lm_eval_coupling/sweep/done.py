"""Decision which tasks of a unit are done, from the results in its folder and no other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep import state
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.request import NOTE, asked
from lm_eval_coupling.sweep.source import same, source
from lm_eval_coupling.sweep.units import Task, Unit

_PARQUET = b"PAR1"  # the first and last four bytes of every Parquet file


@dataclass(frozen=True, kw_only=True)
class Done:
    """Results of a unit that count.

    ``missing`` are the tasks that remain; ``why`` says what keeps other results from counting.
    """

    missing: tuple[Task, ...]
    why: str | None
    measured: int
    failed: int
    seconds: float

    @property
    def complete(self) -> bool:
        """True if no task is missing."""
        return not self.missing


def done(plan: Plan, unit: Unit) -> Done:
    """Find the tasks with complete results of the plan's settings and of the present weights."""
    expected, present = asked(plan, unit), source(unit, plan.run.environment)
    missing = {task.name: task for task in plan.tasks_of(unit)}
    why: str | None = None
    fingerprint: Any = None
    measured = failed = 0
    seconds = 0.0
    # The newest results come first: their fingerprint says which weights are meant.
    for file, run, request in reversed(list(results(plan.folder(unit)))):
        coupling = _coupling(run)
        reason = _reason(plan, unit, file, run, request, expected, present)
        if reason is None and fingerprint not in (None, coupling.get("fingerprint")):
            reason = "they are of other weights"
        if reason is not None:
            why = why or f"{file.name}: {reason}"
            continue
        fingerprint = fingerprint or coupling.get("fingerprint")
        new = [
            name
            for name, value in _tasks(plan, run, request).items()
            if name in missing and missing[name].asked == value
        ]
        for name in new:
            del missing[name]
        if new:
            measured += _count(coupling.get("measured"))
            failed += _count(coupling.get("failed"))
            seconds += number(run.get("total_evaluation_time_seconds"))
    return Done(
        missing=tuple(missing.values()),
        why=why if missing else None,
        measured=measured,
        failed=failed,
        seconds=seconds,
    )


def results(folder: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yield the sweep's results in a unit's folder, oldest first, with the note that they carry.

    Broken files, and results of other evaluations, are left out.
    """
    for file in sorted(folder.glob("*/results_*.json"), key=lambda file: file.name):
        run = state.read_json(file)
        if (request := _note(run)) is not None:
            yield file, run, request


def set_aside(plan: Plan, unit: Unit) -> None:
    """Rename results that no longer count, with tables and samples, so that no reader counts them.

    These are results of other settings or weights, interrupted ones, and files cut short. Nothing
    is deleted: only the ending ``.superseded`` is added.
    """
    expected, present = asked(plan, unit), source(unit, plan.run.environment)
    reasons = {
        file: _reason(plan, unit, file, run, request, expected, present)
        for file, run, request in results(plan.folder(unit))
    }
    for file in plan.folder(unit).glob("*/results_*.json"):
        if file.is_file() and (reasons.get(file) is not None or not state.read_json(file)):
            for belonging in file.parent.glob(f"*_{file.stem.removeprefix('results_')}.*"):
                belonging.rename(belonging.with_name(f"{belonging.name}.superseded"))


def _reason(
    plan: Plan,
    unit: Unit,
    file: Path,
    run: Mapping[str, Any],
    request: Mapping[str, Any],
    expected: Mapping[str, Any],
    present: str | None,
) -> str | None:
    """Return why results do not count, or None if they do."""
    if request.get("asked") != expected:
        before = _mapping(request.get("asked"))
        differing = sorted(key for key in expected if before.get(key) != expected[key])
        return f"asked for with other {', '.join(differing)}"
    if not same(request.get("source"), present):
        return "the model's files have changed since"
    evaluated = {task.name: task.evaluation for task in plan.tasks_of(unit)}
    if plan.samples is not None and any(
        evaluated.get(name, value) != value for name, value in _tasks(plan, run, request).items()
    ):
        return "the samples have changed since"
    if plan.measures:
        coupling = _coupling(run)
        if not coupling:
            return "coupling was not recorded"
        if coupling.get("interrupted"):
            return "the measuring was interrupted"
        if not coupling.get("measured") and coupling.get("failed"):
            return f"none of {coupling['failed']} documents could be measured"
    return _unfinished(plan, file, run)


def _unfinished(plan: Plan, file: Path, run: Mapping[str, Any]) -> str | None:
    """Return which tables or samples are missing: lm-eval writes them after the results."""
    date = file.stem.removeprefix("results_")
    coupling = _coupling(run)
    for prefix, summary in (("", coupling), ("untrained_", _mapping(coupling.get("untrained")))):
        tasks = _mapping(summary.get("tasks"))
        measured = [task for task, counts in tasks.items() if _mapping(counts).get("measured")]
        tables = list(file.parent.glob(f"{prefix}coupling_*_{date}.parquet"))
        if len(tables) < len(measured):
            return "not all tables were written"
        for table in tables:
            if not _is_table(table):
                return f"the table {table.name} is empty or damaged"
    if plan.lm_eval.get("log_samples"):
        evaluated = run.get("configs") if plan.samples is None else coupling.get("tasks")
        for task in _mapping(evaluated):
            if not _has_all_samples(plan, file.parent / f"samples_{task}_{date}.jsonl", run, task):
                return f"the samples of {task} were not written to their end"
    return None


def _is_table(file: Path) -> bool:
    """Return whether a file is a Parquet table of at least one row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as table:
            if table.read(4) != _PARQUET:
                return False
        return pyarrow.parquet.read_metadata(file).num_rows > 0
    except (OSError, ValueError, pyarrow.ArrowException):
        return False


def _has_all_samples(plan: Plan, file: Path, run: Mapping[str, Any], task: str) -> bool:
    """Return whether samples have as many lines for every filter as documents were evaluated.

    lm-eval's ``effective`` counts scores: a document that its task cannot score has a line too.
    """
    counts = _mapping(_mapping(run.get("n-samples")).get(task))
    scored, documents = _count(counts.get("effective")), _documents(plan, counts)
    if plan.samples is not None:
        return file.is_file()  # Written whole, of the lines that were there to be measured.
    try:
        lines, end = 0, b"\n"
        with file.open("rb") as samples:
            while block := samples.read(1 << 20):
                lines, end = lines + block.count(b"\n"), block[-1:]
    except OSError:
        return False
    is_multiple = any(n > 0 and lines % n == 0 for n in (documents, scored))
    return end == b"\n" and lines >= scored and (is_multiple or not max(documents, scored))


def _documents(plan: Plan, counts: Mapping[str, Any]) -> int:
    """Return how many documents lm-eval evaluates of a task under the plan's limit."""
    original, limit = _count(counts.get("original")), plan.lm_eval.get("limit")
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        return original
    return min(original, math.ceil(original * limit) if limit < 1 else int(limit))


def _tasks(plan: Plan, run: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tasks that results were asked for, as the note has them.

    Of samples, each evaluation has results of its own, and all have the note of the unit.
    """
    tasks = _mapping(request.get("tasks"))
    if plan.samples is None:
        return tasks
    return {name: value for name, value in tasks.items() if name in _mapping(run.get("configs"))}


def _coupling(run: Mapping[str, Any]) -> dict[str, Any]:
    return _mapping(_mapping(run.get("config")).get("coupling"))


def _note(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the note that every task's metadata carries."""
    for configuration in _mapping(run.get("configs")).values():
        note = _mapping(_mapping(configuration).get("metadata")).get(NOTE)
        if isinstance(note, dict):
            return note
    return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def number(value: Any) -> float:
    """Return a number that may have been written as text; 0 for anything else."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return result if math.isfinite(result) else 0.0
