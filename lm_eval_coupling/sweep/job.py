"""A unit as a SLURM job: what submitit calls on the node, and how the job leaves when SLURM wants it to."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from lm_eval_coupling.sweep import cluster
from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import COMMAND, Worker

# A file system of many machines lets go the lock of a node that died only when that node's lease is over.
_PATIENCE_SECONDS = 120.0
_SIGNAL_SECONDS = 5.0


class UnitJob:
    """What submitit calls on the node; it comes back to it when the job is asked to leave."""

    def __init__(
        self, plan: Plan, unit: Unit, batch_size: Any = None, command: Sequence[str] = COMMAND
    ) -> None:
        """A unit, with a batch size instead of the plan's, and what runs lm-eval."""
        self.plan, self.unit, self.batch_size, self.command = plan, unit, batch_size, command
        self._worker: Worker | None = None

    def __call__(self) -> dict[str, Any]:
        """Work on the unit."""
        from submitit.core.utils import UncompletedJobError

        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        threads = (
            {"OMP_NUM_THREADS": cpus}
            if cpus and "OMP_NUM_THREADS" not in self.plan.run.environment
            else {}
        )
        self._worker = Worker(self.plan, threads, self.command, patience=_PATIENCE_SECONDS)
        try:
            outcome = self._worker.run(self.unit, self.batch_size)
            if outcome.state == "stopped":
                self._leave()
        except (
            UncompletedJobError
        ) as error:  # raised by the signal's handler, where the job may not be queued once more
            record.write(self.plan.folder(self.unit), state="stopped", reason=str(error))
            raise
        return dataclasses.asdict(outcome)

    def _leave(self) -> None:
        """Queue the job again if SLURM only asked lm-eval to end; where it ends the job, it knows itself what is to follow.

        Before a preemption with a time of grace SLURM sends SIGTERM and leaves the job running; one that then ends by itself
        counts as completed and would not come back. After ``scancel`` a job is not running any more.
        """
        from submitit import JobEnvironment

        time.sleep(_SIGNAL_SECONDS)  # the signal of a time-out is on its way to this process, too
        record.write(self.plan.folder(self.unit), state="waiting", reason="asked to leave")
        if cluster.state(record.job() or "") == "RUNNING":
            os.kill(os.getpid(), JobEnvironment._usr_sig())

    def checkpoint(self) -> Any:
        """Preempted or out of time: end lm-eval, whose measurements are stored, and go on in the job's next life."""
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        # SLURM may say it twice, and ends what is here as soon as the job is queued again. Neither may break in upon that,
        # nor upon `scontrol`, which inherits this.
        for number in (JobEnvironment._usr_sig(), signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        pickle = JobEnvironment().paths.submitted_pickle
        pickle.with_suffix(f"{pickle.suffix}.save_tmp").unlink(
            missing_ok=True
        )  # of a life that was killed just here
        if self._worker is not None:
            self._worker.kill()
        return DelayedSubmission(UnitJob(self.plan, self.unit, self.batch_size, self.command))
