"""Units on a SLURM cluster, through submitit: one element of an array for each, queued again when it has to leave.

The sweep itself only submits and watches. It may die: the jobs go on, and the same command finds them in the queue.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import record
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.done import done
from lm_eval_coupling.sweep.plan import Plan, Slurm
from lm_eval_coupling.sweep.status import look
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import COMMAND, Worker, half

_ARRAY = 1000  # clusters allow 1001 elements unless they say otherwise
_POLL_SECONDS = 2.0
_SIGNAL_SECONDS = 90


class UnitJob:
    """What submitit calls on the node; it comes back to it when the job is asked to leave."""

    def __init__(self, plan: Plan, unit: Unit, batch_size: Any = None, command: Sequence[str] = COMMAND) -> None:
        """A unit, with a batch size instead of the plan's, and what runs lm-eval."""
        self.plan, self.unit, self.batch_size, self.command = plan, unit, batch_size, command
        self._worker: Worker | None = None

    def __call__(self) -> dict[str, Any]:
        """Work on the unit."""
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        threads = {"OMP_NUM_THREADS": cpus} if cpus and "OMP_NUM_THREADS" not in self.plan.run.environment else {}
        self._worker = Worker(self.plan, threads, self.command)
        try:
            outcome = self._worker.run(self.unit, self.batch_size)
        except Exception as error:  # raised by the signal's handler, where the job may not be queued once more
            record.write(self.plan.folder(self.unit), state="stopped", reason=str(error))
            raise
        if outcome.state == "stopped":
            time.sleep(5)  # the signal that stopped lm-eval is on its way to us, too: then the job is queued again
        return dataclasses.asdict(outcome)

    def checkpoint(self) -> Any:
        """Preempted or out of time: end lm-eval, whose measurements are stored, and go on in the job's next life."""
        from submitit.helpers import DelayedSubmission

        if self._worker is not None:
            self._worker.kill()
        return DelayedSubmission(UnitJob(self.plan, self.unit, self.batch_size, self.command))


def run(plan: Plan, units: Sequence[Unit], board: Board, command: Sequence[str] = COMMAND) -> None:
    """Submit what is not in the queue, and watch until nothing is left there.

    Args:
        plan: the plan.
        units: those to be done.
        board: is told how it goes.
        command: see :class:`~lm_eval_coupling.sweep.work.Worker`.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the jobs go on.
    """
    try:
        sizes: dict[str, Any] = {}
        waiting = list(units)
        while waiting:
            now, waiting = waiting[:_ARRAY], waiting[_ARRAY:]
            queue = jobs() or {}
            fresh = [unit for unit in now if str(record.read(plan.folder(unit)).get("job")) not in queue]
            _submit(plan, [UnitJob(plan, unit, sizes.get(unit.name), command) for unit in fresh], board)
            for unit in _watch(plan, now, board):  # memory ran out, and the system killed the job
                size = plan.lm_eval.get("batch_size", 1)
                if unit.name not in sizes and (smaller := half(size)) is not None:
                    sizes[unit.name] = smaller
                    waiting.append(unit)
    except KeyboardInterrupt:
        board.say("the jobs go on: the same command shows them again, scancel ends them")
        raise


def _submit(plan: Plan, works: Sequence[UnitJob], board: Board) -> None:
    if not works:
        return
    import submitit

    assert isinstance(plan.run, Slurm)
    executor = submitit.SlurmExecutor(plan.output.absolute() / "slurm", max_num_timeout=plan.run.requeues)
    executor.update_parameters(**parameters(plan.run, len(works)))
    with executor.batch():
        submitted = [executor.submit(work) for work in works]
    for work, job in zip(works, submitted, strict=True):
        record.write(plan.folder(work.unit), state="waiting", job=job.job_id)
        board.set(work.unit, "waiting", f"job {job.job_id}")


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


def _watch(plan: Plan, units: Sequence[Unit], board: Board) -> list[Unit]:
    """Wait until no unit has a job any more; returns those whose job was killed for its memory."""
    left, absent, killed = list(units), dict.fromkeys((unit.name for unit in units), 0), []
    while left:
        time.sleep(_POLL_SECONDS)
        if (queue := jobs()) is None:  # the controller does not answer: that says nothing of the jobs
            continue
        for unit in [*left]:
            job = str(record.read(plan.folder(unit)).get("job"))
            if job in queue:
                absent[unit.name] = 0
                running = queue[job] in ("RUNNING", "COMPLETING")
                board.set(unit, "running" if running else "waiting", "" if running else f"job {job} {queue[job]}")
                continue
            absent[unit.name] += 1
            if absent[unit.name] < 2 and not done(plan, unit).complete:
                continue
            left.remove(unit)
            ended = ended_as(job)
            if ended == "OUT_OF_MEMORY" and not done(plan, unit).complete:
                killed.append(unit)
            _close(plan, unit, job, ended, board)
    return killed


def _close(plan: Plan, unit: Unit, job: str, ended: str | None, board: Board) -> None:
    """Say how a job ended that could not say so itself."""
    status = look(plan, unit, {})
    # Its own word counts if the job came to an end by itself, well or badly.
    said = ended in (None, "COMPLETED", "FAILED") and record.read(plan.folder(unit)).get("state") not in (
        "running",
        "waiting",
    )
    if status.state != "done" and not said:
        reason = f"job {job} ended" + (f" as {ended}" if ended else "")
        record.write(plan.folder(unit), state="stopped", reason=reason, job=job)
        status = look(plan, unit, {})
    board.set(unit, status.state, status.detail, status.seconds or None)


def jobs() -> dict[str, str] | None:
    """The state of every job of this user, elements of arrays one by one; None if the cluster does not answer."""
    listed = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %T")
    return None if listed is None else dict(line.split()[:2] for line in listed.splitlines() if len(line.split()) > 1)


def ended_as(job: str) -> str | None:
    """How a job ended, for as long as the cluster remembers it."""
    told = _ask("scontrol", "show", "job", "--oneliner", job) or ""
    return next((word.removeprefix("JobState=") for word in told.split() if word.startswith("JobState=")), None)


def require() -> None:
    """See that jobs can be submitted from here.

    Raises:
        CouplingError: if not.
    """
    if shutil.which("sbatch") is None:
        raise CouplingError("got run.on: slurm, but there is no sbatch on this machine; call the sweep on a login node")
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise CouplingError(
            "got run.on: slurm, which needs submitit; install it with pip install 'lm-eval-coupling[slurm]'"
        ) from None


def _ask(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
