"""Sweep on a SLURM cluster through submitit: one job a unit, queued again when it has to leave.

The sweep itself only submits and watches. It may die: the jobs go on, and the same command finds
them in the queue.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import cluster, state
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.child_environment import defaults_of_user, environment_of_jobs
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.done import done
from lm_eval_coupling.sweep.job import UnitJob
from lm_eval_coupling.sweep.lock import held
from lm_eval_coupling.sweep.plan import Plan, Slurm
from lm_eval_coupling.sweep.plan_secrets import hide
from lm_eval_coupling.sweep.status import look
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import half

_POLL_SECONDS = 2.0
_SIGNAL_SECONDS = 90
# Ends that nobody asked for. Unless the job has given a reason itself, the node, the scheduler or
# the network is to blame.
_LOST = ("BOOT_FAIL", "COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")


@dataclass(frozen=True, kw_only=True)
class _End:
    """End of a job: its last state, whether it gave a reason itself, whether lm-eval had begun."""

    job: str | None
    has_reason: bool
    has_begun: bool


def run(
    plan: Plan, units: Sequence[Unit], board: Board, command: Sequence[str] | None = None
) -> None:
    """Submit the units that are not in the queue, and watch until none is left there.

    ``command`` is that of :class:`~lm_eval_coupling.sweep.work.Worker`.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the jobs go on.
        CouplingError: if the cluster takes no jobs.
    """
    assert isinstance(plan.run, Slurm)
    try:
        sizes: dict[str, Any] = {}
        tries: Counter[str] = Counter()
        waiting = list(units)
        array = cluster.largest_array()
        # SLURM applies `at_once` to each array, so that only one array may exist at a time.
        count = array if plan.run.at_once else 1000
        while waiting:
            batch, waiting = waiting[:count], waiting[count:]
            queue = _queue(board)
            fresh = [
                unit
                for unit in batch
                if _job(plan, unit) not in queue and not held(plan.folder(unit) / state.LOCK)
            ]
            jobs = [UnitJob(plan, unit, sizes.get(unit.name), command) for unit in fresh]
            for start in range(0, len(jobs), array):
                _submit(plan, jobs[start : start + array], board)
            at_work = {unit.name for unit in batch if unit in fresh or _job(plan, unit) in queue}
            for unit, end in _watch(plan, batch, board):
                smaller = half(plan.lm_eval.get("batch_size", 1))
                if unit.name not in at_work:  # Another process had the unit and has released it.
                    waiting.append(unit)
                elif end.job == "OUT_OF_MEMORY" and unit.name not in sizes and smaller is not None:
                    # The system killed the whole job, which could not try again itself.
                    sizes[unit.name] = smaller
                    waiting.append(unit)
                elif (
                    end.job in _LOST
                    and not end.has_reason
                    and tries[unit.name] < (plan.run.requeues if end.has_begun else 1)
                ):
                    tries[unit.name] += 1
                    waiting.append(unit)
    except KeyboardInterrupt:
        board.say("the jobs go on: the same command shows them again, scancel ends them")
        raise


def _job(plan: Plan, unit: Unit) -> str:
    return str(state.read(plan.folder(unit)).get("job"))


def _queue(board: Board) -> Mapping[str, Job]:
    """Return the queue, waiting for a controller that does not answer.

    Its silence says nothing of the jobs: to take them for gone would submit them twice.
    """
    is_announced = False
    while (queue := cluster.jobs()) is None:
        if not is_announced:
            board.say(
                f"the cluster does not answer ({cluster.why_silent()}): waiting for it; jobs in "
                "its queue go on"
            )
            is_announced = True
        time.sleep(_POLL_SECONDS)
    return queue


def _submit(plan: Plan, jobs: Sequence[UnitJob], board: Board) -> None:
    """Submit one job, or several as one array."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    assert isinstance(plan.run, Slurm)
    chosen = {name: getattr(plan.run, name) for name in ("partition", "account", "qos")}
    chosen |= {"constraint": plan.run.constraint, **plan.run.options}
    try:
        with environment_of_jobs(chosen, plan.environment):
            executor = submitit.SlurmExecutor(
                _private_folder(plan), max_num_timeout=plan.run.requeues
            )
            executor.update_parameters(**parameters(plan.run, len(jobs)))
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        defaults = defaults_of_user(chosen)
        if defaults:
            given = ", ".join(f"{name}={value}" for name, value in defaults.items())
            words = f"{words} (with {given} of the environment)"
        words = hide(words, plan.secrets.values())
        raise CouplingError(f"the cluster did not take the jobs: {words}") from None
    for job, ticket in zip(jobs, submitted, strict=True):
        state.write(plan.folder(job.unit), job=ticket.job_id, state="waiting")
        board.set(job.unit, "waiting", f"job {ticket.job_id}")


def _private_folder(plan: Plan) -> Path:
    """Return the folder of submitit's files, closed to others.

    A job loads its pickle from there, and the lines of ``setup`` may hold a secret.
    """
    folder = plan.output.absolute() / "slurm"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return folder


def parameters(run: Slurm, count: int) -> dict[str, Any]:
    """Return the parameters of submitit's executor for ``count`` jobs."""
    minutes = max(1, math.ceil(run.hours * 60))
    chosen = {
        "job_name": "coupling-sweep",
        "time": minutes,
        "partition": run.partition,
        "account": run.account,
        "qos": run.qos,
        "constraint": run.constraint,
        "gpus_per_node": run.gpus or None,
        "cpus_per_task": run.cpus,
        "mem": f"{math.ceil(run.memory_gb * 1024)}MB" if run.memory_gb else None,
        "array_parallelism": run.at_once or count,
        "setup": [*run.setup] or None,
        "signal_delay_s": min(_SIGNAL_SECONDS, minutes * 15),
        "additional_parameters": dict(run.options) or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _watch(plan: Plan, units: Sequence[Unit], board: Board) -> Iterator[tuple[Unit, _End]]:
    """Wait until no unit has a job any more; yield those that are not done."""
    left, absent = list(units), Counter[str]()
    while left:
        time.sleep(_POLL_SECONDS)
        queue = _queue(board)
        for unit in [*left]:
            name = _job(plan, unit)
            if (job := queue.get(name)) is not None:
                absent[unit.name] = 0
                if job.running:
                    board.set(unit, "running")
                else:
                    board.set(unit, "waiting", f"job {name} {job}")
                continue
            if held(plan.folder(unit) / state.LOCK):
                absent[unit.name] = 0
                board.set(unit, "running", "in another process")
                continue
            absent[unit.name] += 1
            if absent[unit.name] < 2 and not done(plan, unit).complete:
                continue
            last_state = cluster.state(name)
            if not cluster.over(last_state):
                continue  # The queue was listed between two states of the job.
            left.remove(unit)
            if (end := _close(plan, unit, name, last_state, board)) is not None:
                yield unit, end
        board.report()


def _close(plan: Plan, unit: Unit, job: str, last_state: str | None, board: Board) -> _End | None:
    """Record the end of a job that could not do so itself; return None if the unit is done."""
    status, written = look(plan, unit, {}), state.read(plan.folder(unit)).get("state")
    has_ended = last_state in (None, "COMPLETED", "FAILED")
    has_reason = has_ended and written not in ("running", "waiting")
    if status.state != "done" and not has_reason:
        reason = f"job {job} ended" + (f" as {last_state}" if last_state else "")
        log = plan.output / "slurm" / f"{job}_0_log.err"
        if last_state in _LOST and log.exists():
            reason += f"; see {log}"
        state.write(plan.folder(unit), job=job, state="stopped", reason=reason)
        status = look(plan, unit, {})
    board.set(unit, status.state, status.detail, status.seconds or None)
    if status.state == "done":
        return None
    return _End(job=last_state, has_reason=has_reason, has_begun=written != "waiting")
