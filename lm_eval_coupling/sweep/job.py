"""Unit as a SLURM job: the work on the node, and the job's leave when SLURM asks for it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from lm_eval_coupling.sweep import cluster, state
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import Worker

# A file system of many machines releases the lock of a dead node only when its lease is over.
_PATIENCE_SECONDS = 120.0
_SIGNAL_SECONDS = 5.0


class UnitJob:
    """Function that submitit pickles and calls on the node, and asks for a checkpoint."""

    def __init__(
        self, plan: Plan, unit: Unit, batch_size: Any = None, command: Sequence[str] | None = None
    ) -> None:
        """Take a unit, a batch size instead of the plan's, and the command that runs lm-eval."""
        self.plan, self.unit, self.batch_size, self.command = plan, unit, batch_size, command
        self._worker: Worker | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values of secrets out of the pickle: the job has them in its environment."""
        secrets = dict.fromkeys(self.plan.secrets, "")
        plan = dataclasses.replace(self.plan, secrets=secrets)
        return self.__dict__ | {"plan": plan, "_worker": None}

    def __call__(self) -> dict[str, Any]:
        """Work on the unit and return the outcome as a dictionary."""
        from submitit.core.utils import UncompletedJobError

        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        has_threads = "OMP_NUM_THREADS" in self.plan.run.environment
        threads = {"OMP_NUM_THREADS": cpus} if cpus and not has_threads else {}
        secrets = {name: os.environ[name] for name in self.plan.secrets if name in os.environ}
        self.plan = dataclasses.replace(self.plan, secrets=secrets)
        self._worker = Worker(
            self.plan, threads, self.command, patience=_PATIENCE_SECONDS, job=_job_of_this_process()
        )
        try:
            outcome = self._worker.run(self.unit, self.batch_size)
            if outcome.state == "stopped":
                self._leave()
        except UncompletedJobError as error:
            # Raised by submitit's handler of signals, if the job may not be queued once more.
            self._write("stopped", str(error))
            raise
        return dataclasses.asdict(outcome)

    def _write(self, name: str, reason: str) -> None:
        folder = self.plan.folder(self.unit)
        state.write(folder, job=_job_of_this_process(), state=name, reason=reason)

    def _leave(self) -> None:
        """Queue the job again if SLURM only asked lm-eval to end.

        Before a preemption with a time of grace SLURM sends SIGTERM and leaves the job running. A
        job that then ends by itself counts as completed and would not come back. After ``scancel``
        a job is not running any more, and what ends it decides what follows.
        """
        from submitit import JobEnvironment

        time.sleep(_SIGNAL_SECONDS)  # The signal of a time-out reaches this process a bit later.
        self._write("waiting", "asked to leave")
        if cluster.state(_job_of_this_process() or "") == "RUNNING":
            os.kill(os.getpid(), JobEnvironment._usr_sig())

    def checkpoint(self) -> Any:
        """End lm-eval, which stores what it measures, and return the work for the next start."""
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        # SLURM may send its signal twice, and ends this process as soon as the job is queued again.
        # Neither may interrupt the queueing, nor `scontrol`, which inherits this setting.
        for number in (JobEnvironment._usr_sig(), signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        pickle = JobEnvironment().paths.submitted_pickle
        # Left by an earlier start of this job that was killed at this point.
        pickle.with_suffix(f"{pickle.suffix}.save_tmp").unlink(missing_ok=True)
        if self._worker is not None:
            self._worker.kill()
        return DelayedSubmission(UnitJob(self.plan, self.unit, self.batch_size, self.command))


def _job_of_this_process() -> str | None:
    """Return the SLURM job that this process belongs to, in submitit's notation."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID")
