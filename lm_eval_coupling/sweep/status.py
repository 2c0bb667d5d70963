"""State of every unit, from its results, its lock, its last worker and the cluster's queue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.safe_text import one_line
from lm_eval_coupling.sweep import state
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.done import Done, done, number
from lm_eval_coupling.sweep.lock import held
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.reasons import tail
from lm_eval_coupling.sweep.units import Unit

# A bar of tqdm, perhaps behind a time and level: `Measuring coupling:  40%|####      | 4/10 …`.
_BAR = re.compile(r"^(?:\d{4}-\S+ \S+ +\[\S+\] )?([A-Z][\w ,]*?): +(\d+)%\|")


@dataclass(frozen=True, kw_only=True)
class Status:
    """State of a unit: done, running, waiting (in a queue), failed, stopped or missing."""

    unit: Unit
    state: str
    detail: str
    results: Done
    log: Path
    seconds: float


def look(plan: Plan, unit: Unit, queue: Mapping[str, Job] | None) -> Status:
    """Return the state of a unit, the reason for it, what exists of the unit and where its log is.

    ``queue`` are the jobs that are not over, by name: empty without a cluster, and None if the
    cluster does not answer.
    """
    folder, finished = plan.folder(unit), done(plan, unit)
    last = state.read(folder)
    log = folder / state.LOG
    name, detail = _state(folder, finished, last, queue)
    n_tasks = len(plan.tasks_of(unit))
    if name not in ("done", "running", "waiting") and len(finished.missing) < n_tasks:
        tasks = ", ".join(task.name for task in finished.missing)
        remaining = f"{len(finished.missing)} of {n_tasks} tasks: {tasks}"
        detail = f"{detail}; {remaining}" if detail else remaining
    # Results that were measured from samples have the seconds of the scoring.
    is_timed = finished.complete and plan.samples is None
    seconds = finished.seconds if is_timed else number(last.get("seconds"))
    detail = one_line(detail)  # the state in a folder may be of anybody
    return Status(unit=unit, state=name, detail=detail, results=finished, log=log, seconds=seconds)


def _state(
    folder: Path, finished: Done, last: Mapping[str, Any], queue: Mapping[str, Job] | None
) -> tuple[str, str]:
    """Return the state of one run of a sweep: a word, and what else is known.

    Args:
        folder: the run's.
        finished: the files that it has written.
        last: the state that it saved last.
        queue: the user's jobs by name; None if no cluster answers.
    """
    if finished.complete:
        return "done", _measured(finished)
    if held(folder / state.LOCK):
        return "running", progress(folder / state.LOG)
    name = last.get("job")
    if (job := (queue or {}).get(str(name))) is not None:
        if job.running:
            return "running", progress(folder / state.LOG)
        return "waiting", f"job {name} {job}"
    if last.get("state") in ("failed", "stopped"):
        return last["state"], str(last.get("reason") or "")
    if last.get("state") in ("running", "waiting"):
        if name and queue is None:
            return last["state"], f"job {name} when last seen; the cluster does not answer"
        where = f"job {name}" if name else f"process {last.get('pid')} on {last.get('host')}"
        return "stopped", f"{where} ended before it was done"
    return "missing", finished.why or ""


def progress(log: Path) -> str:
    """Return what lm-eval's last progress bar shows, such as ``measuring coupling 40 %``."""
    for line in reversed(tail(log, 4000).splitlines()):
        if bar := _BAR.match(line.strip()):
            return f"{bar[1].lower()} {bar[2]} %"
    return "starting"


def _measured(finished: Done) -> str:
    if not finished.measured and not finished.failed:
        return ""
    failed = f", {finished.failed} not" if finished.failed else ""
    return f"{finished.measured} documents measured{failed}"
