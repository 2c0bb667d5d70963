"""What is done of a unit, read off the results that lie in its folder; no other file has a say in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.request import NOTE, asked
from lm_eval_coupling.sweep.source import same, source
from lm_eval_coupling.sweep.units import Task, Unit


@dataclass(frozen=True, kw_only=True)
class Done:
    """``missing``: the tasks that are to be done; ``why``: what keeps results that are there from counting."""

    missing: tuple[Task, ...]
    why: str | None
    measured: int
    failed: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


def done(plan: Plan, unit: Unit) -> Done:
    """Which of the plan's tasks have complete results with the plan's settings and the weights as they are now."""
    expected, now = asked(plan, unit), source(unit, plan.run.environment)
    wanted = {task.name: task for task in plan.tasks}
    why: str | None = None
    measured = failed = 0
    seconds = 0.0
    fingerprint: str | None = None
    for file, run, told in reversed(
        list(results(plan.folder(unit)))
    ):  # the newest first: it says which weights are meant
        reason = _reason(plan, file, run, told, expected, now)
        coupling = _coupling(run)
        if reason is None and fingerprint not in (None, coupling.get("fingerprint")):
            reason = "they are of other weights"
        if reason is not None:
            why = why or f"{file.name}: {reason}"
            continue
        fingerprint = fingerprint or coupling.get("fingerprint")
        new = [
            name
            for name, shots in told["tasks"].items()
            if name in wanted and wanted[name].num_fewshot == shots
        ]
        for name in new:
            del wanted[name]
        if new:
            measured, failed = (
                measured + coupling.get("measured", 0),
                failed + coupling.get("failed", 0),
            )
            seconds += float(run.get("total_evaluation_time_seconds") or 0)
    return Done(
        missing=tuple(wanted.values()),
        why=why if wanted else None,
        measured=measured,
        failed=failed,
        seconds=seconds,
    )


def results(folder: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """The results in a unit's folder, oldest first, with what they say was asked for; broken and foreign files left out."""
    for file in sorted(folder.glob("*/results_*.json"), key=lambda file: file.name):
        run = _read(file)
        told = _told(run) if run is not None else None
        if run is not None and told is not None:
            yield file, run, told


def set_aside(plan: Plan, unit: Unit) -> None:
    """Rename what no longer counts, with its tables and samples, so that readers of the folder do not count it either.

    These are results of other settings or weights, interrupted ones, and files whose writing was cut short. Nothing is
    deleted: without the ending ``.superseded`` they are what they were.
    """
    expected, now = asked(plan, unit), source(unit, plan.run.environment)
    whole = {
        file: _reason(plan, file, run, told, expected, now)
        for file, run, told in results(plan.folder(unit))
    }
    for file in plan.folder(unit).glob("*/results_*.json"):
        if whole.get(file) is not None or _read(file) is None:
            for belonging in file.parent.glob(f"*_{file.stem.removeprefix('results_')}.*"):
                belonging.rename(belonging.with_name(f"{belonging.name}.superseded"))


def _reason(
    plan: Plan,
    file: Path,
    run: Mapping[str, Any],
    told: Mapping[str, Any],
    expected: Mapping[str, Any],
    now: str | None,
) -> str | None:
    """Why results do not count, or None."""
    if told.get("asked") != expected:
        differing = sorted(
            key for key in expected if told.get("asked", {}).get(key) != expected[key]
        )
        return f"asked for with other {', '.join(differing)}"
    if not same(told.get("source"), now):
        return "the model's files have changed since"
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
    """Tables and samples are written after the results; a kill in between leaves some of them out."""
    date = file.stem.removeprefix("results_")
    coupling = _coupling(run)
    for prefix, of in (("", coupling), ("untrained_", coupling.get("untrained") or {})):
        measured = [
            task for task, found in (of.get("tasks") or {}).items() if found.get("measured")
        ]
        if len(list(file.parent.glob(f"{prefix}coupling_*_{date}.parquet"))) < len(measured):
            return "not all tables were written"
    if plan.lm_eval.get("log_samples"):
        for task in run.get("configs", {}):
            if not _samples_whole(file.parent / f"samples_{task}_{date}.jsonl", run, task):
                return f"the samples of {task} were not written to their end"
    return None


def _samples_whole(file: Path, run: Mapping[str, Any], task: str) -> bool:
    """One line for each document and filter."""
    documents = (run.get("n-samples", {}).get(task) or {}).get("effective") or 0
    try:
        lines, end = 0, b"\n"
        with file.open("rb") as samples:
            while block := samples.read(1 << 20):
                lines, end = lines + block.count(b"\n"), block[-1:]
    except OSError:
        return False
    return end == b"\n" and lines >= documents and (not documents or lines % documents == 0)


def _coupling(run: Mapping[str, Any]) -> dict[str, Any]:
    return (run.get("config") or {}).get("coupling") or {}


def _told(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The note that every task's metadata carries."""
    for configuration in (run.get("configs") or {}).values():
        found = (configuration.get("metadata") or {}).get(NOTE)
        if isinstance(found, dict):
            return found
    return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run if isinstance(run, dict) else None
