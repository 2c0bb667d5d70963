"""Units on a SLURM cluster, through submitit: one element of an array for each, queued again when it has to leave.

The sweep itself only submits and watches. It may die: the jobs go on, and the same command finds them in the queue.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import cluster
from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.done import done
from lm_eval_coupling.sweep.job import UnitJob
from lm_eval_coupling.sweep.lock import held
from lm_eval_coupling.sweep.plan import Plan, Slurm
from lm_eval_coupling.sweep.status import look
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import COMMAND, half

_ARRAY = 1000  # clusters allow 1001 elements unless they say otherwise
_POLL_SECONDS = 2.0
_SIGNAL_SECONDS = 90
# Ends that are nobody's wish: the node, the scheduler or the network is to blame as long as the job itself has not said why.
_LOST = ("BOOT_FAIL", "COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")


@dataclass(frozen=True, kw_only=True)
class _End:
    """The state that a job ended in, whether the job itself has said why, and whether lm-eval had begun."""

    job: str | None
    said: bool
    begun: bool


def run(plan: Plan, units: Sequence[Unit], board: Board, command: Sequence[str] = COMMAND) -> None:
    """Submit what is not in the queue, and watch until nothing is left there.

    Args:
        plan: the plan.
        units: those to be done.
        board: is told how it goes.
        command: see :class:`~lm_eval_coupling.sweep.work.Worker`.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the jobs go on.
        CouplingError: if the cluster takes no jobs.
    """
    assert isinstance(plan.run, Slurm)
    try:
        sizes: dict[str, Any] = {}
        tries: Counter[str] = Counter()
        waiting = list(units)
        while waiting:
            now, waiting = waiting[:_ARRAY], waiting[_ARRAY:]
            queue = _queue(board)
            fresh = [
                unit
                for unit in now
                if _job(plan, unit) not in queue and not held(plan.folder(unit) / record.LOCK)
            ]
            _submit(
                plan, [UnitJob(plan, unit, sizes.get(unit.name), command) for unit in fresh], board
            )
            at_work = {unit.name for unit in now if unit in fresh or _job(plan, unit) in queue}
            for unit, end in _watch(plan, now, board):
                smaller = half(plan.lm_eval.get("batch_size", 1))
                if unit.name not in at_work:  # another process had it, and has let it go
                    waiting.append(unit)
                elif end.job == "OUT_OF_MEMORY" and unit.name not in sizes and smaller is not None:
                    sizes[unit.name] = (
                        smaller  # the system killed the whole job, which could not try again itself
                    )
                    waiting.append(unit)
                elif (
                    end.job in _LOST
                    and not end.said
                    and tries[unit.name] < (plan.run.requeues if end.begun else 1)
                ):
                    tries[unit.name] += 1
                    waiting.append(unit)
    except KeyboardInterrupt:
        board.say("the jobs go on: the same command shows them again, scancel ends them")
        raise


def _job(plan: Plan, unit: Unit) -> str:
    return str(record.read(plan.folder(unit)).get("job"))


def _queue(board: Board) -> Mapping[str, Job]:
    """The queue. A controller that does not answer says nothing of the jobs: to take them for gone would double them."""
    said = False
    while (queue := cluster.jobs()) is None:
        if not said:
            board.say(
                "the cluster does not answer (squeue): waiting for it; jobs in its queue go on"
            )
            said = True
        time.sleep(_POLL_SECONDS)
    return queue


def _submit(plan: Plan, works: Sequence[UnitJob], board: Board) -> None:
    if not works:
        return
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    assert isinstance(plan.run, Slurm)
    executor = submitit.SlurmExecutor(
        plan.output.absolute() / "slurm", max_num_timeout=plan.run.requeues
    )
    executor.update_parameters(**parameters(plan.run, len(works)))
    try:
        with executor.batch():
            submitted = [executor.submit(work) for work in works]
    except (FailedJobError, FailedSubmissionError) as error:
        raise CouplingError(f"the cluster did not take the jobs: {_last_line(error)}") from None
    for work, job in zip(works, submitted, strict=True):
        record.write(plan.folder(work.unit), state="waiting", job=job.job_id)
        board.set(work.unit, "waiting", f"job {job.job_id}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def parameters(run: Slurm, count: int) -> dict[str, Any]:
    """What submitit's executor is told."""
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
    """Wait until no unit has a job any more; yields those that are not done."""
    left, absent = list(units), Counter[str]()
    while left:
        time.sleep(_POLL_SECONDS)
        queue = _queue(board)
        for unit in [*left]:
            job = _job(plan, unit)
            if (found := queue.get(job)) is not None:
                absent[unit.name] = 0
                board.set(
                    unit, *("running",) if found.running else ("waiting", f"job {job} {found}")
                )
                continue
            if held(plan.folder(unit) / record.LOCK):
                absent[unit.name] = 0
                board.set(unit, "running", "in another process")
                continue
            absent[unit.name] += 1
            if absent[unit.name] < 2 and not done(plan, unit).complete:
                continue
            if not cluster.over(
                ended := cluster.state(job)
            ):  # the list was made between two of its states
                continue
            left.remove(unit)
            if (end := _close(plan, unit, job, ended, board)) is not None:
                yield unit, end


def _close(plan: Plan, unit: Unit, job: str, ended: str | None, board: Board) -> _End | None:
    """Say how a job ended that could not say so itself; returns None if the unit is done."""
    status, last = look(plan, unit, {}), record.read(plan.folder(unit)).get("state")
    said = ended in (None, "COMPLETED", "FAILED") and last not in ("running", "waiting")
    if status.state != "done" and not said:
        reason = f"job {job} ended" + (f" as {ended}" if ended else "")
        log = plan.output / "slurm" / f"{job}_0_log.err"
        reason += f"; see {log}" if ended in _LOST and log.exists() else ""
        record.write(plan.folder(unit), state="stopped", reason=reason, job=job)
        status = look(plan, unit, {})
    board.set(unit, status.state, status.detail, status.seconds or None)
    return None if status.state == "done" else _End(job=ended, said=said, begun=last != "waiting")
