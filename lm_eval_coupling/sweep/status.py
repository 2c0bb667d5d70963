"""Where every unit stands: from its results, its lock, what its last worker said, and the cluster's queue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.done import Done, done
from lm_eval_coupling.sweep.lock import held
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.reasons import tail
from lm_eval_coupling.sweep.units import Unit

_BAR = re.compile(r"^(?:\d{4}-\S+ \S+ +\[\S+\] )?([A-Z][\w ,]*?): +(\d+)%\|")


@dataclass(frozen=True, kw_only=True)
class Status:
    """``state``: done, running, waiting (in the cluster's queue), failed, stopped or missing; ``detail`` in words."""

    unit: Unit
    state: str
    detail: str
    found: Done
    log: Path
    seconds: float


def look(plan: Plan, unit: Unit, queue: Mapping[str, Job] | None) -> Status:
    """See where a unit stands.

    Args:
        plan: the plan.
        unit: the model and revision.
        queue: the jobs that are not over, by name; none where no cluster is used, None if it does not answer.

    Returns:
        Its state with the reason, what is there of it, and where its log is.
    """
    folder, found = plan.folder(unit), done(plan, unit)
    said = record.read(folder)
    log = folder / record.LOG
    state, detail = "missing", found.why or ""
    if found.complete:
        state, detail = "done", _measured(found)
    elif held(folder / record.LOCK):
        state, detail = "running", progress(log)
    elif (job := (queue or {}).get(str(said.get("job")))) is not None:
        state, detail = (
            ("running", progress(log)) if job.running else ("waiting", f"job {said['job']} {job}")
        )
    elif said.get("state") in ("failed", "stopped"):
        state, detail = said["state"], str(said.get("reason") or "")
    elif said.get("state") in ("running", "waiting"):
        name = said.get("job")
        where = f"job {name}" if name else f"process {said.get('pid')} on {said.get('host')}"
        state, detail = "stopped", f"{where} ended before it was done"
        if name and queue is None:
            state, detail = (
                said["state"],
                f"job {name}, as last heard of; the cluster does not answer",
            )
    if state not in ("done", "running", "waiting") and len(found.missing) < len(plan.tasks):
        names = ", ".join(task.name for task in found.missing)
        detail = (
            f"{detail}; " * bool(detail)
            + f"{len(found.missing)} of {len(plan.tasks)} tasks: {names}"
        )
    seconds = found.seconds if found.complete else float(said.get("seconds") or 0)
    return Status(unit=unit, state=state, detail=detail, found=found, log=log, seconds=seconds)


def progress(log: Path) -> str:
    """What lm-eval's own bar shows at the moment."""
    for line in reversed(tail(log, 4000).splitlines()):
        if bar := _BAR.match(line.strip()):
            return f"{bar[1].lower()} {bar[2]} %"
    return "starting"


def _measured(found: Done) -> str:
    if not found.measured and not found.failed:
        return ""
    return f"{found.measured} documents measured" + (
        f", {found.failed} not" if found.failed else ""
    )
