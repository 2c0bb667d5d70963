"""What SLURM knows of jobs, as its own commands say it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from lm_eval_coupling.errors import CouplingError

# States in which a job is over; in any other it is at work or will be, such as between its being queued again and its start.
_OVER = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
    ),
    "TIMEOUT",
}


@dataclass(frozen=True)
class Job:
    """A job in the queue: its state, and why it waits."""

    state: str
    why: str = ""

    @property
    def running(self) -> bool:
        """Whether it has a node."""
        return self.state in ("RUNNING", "COMPLETING")

    def __str__(self) -> str:
        """For people."""
        return f"{self.state} ({self.why})" if self.why else self.state


def jobs() -> dict[str, Job] | None:
    """The jobs of this user that are not over, elements of arrays one by one; None if the cluster does not answer."""
    listed = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %T %r")
    if listed is None:
        return None
    found: dict[str, Job] = {}
    for line in listed.splitlines():
        name, state, why = (*line.split(maxsplit=2), "", "", "")[:3]
        if state:
            found[name] = Job(state, "" if why.strip() == "None" else why.strip())
    return found


def state(job: str) -> str | None:
    """A job's state, for as long after its end as the cluster remembers it."""
    told = _ask("scontrol", "show", "job", "--oneliner", job) or ""
    return next(
        (word.removeprefix("JobState=") for word in told.split() if word.startswith("JobState=")),
        None,
    )


def over(state: str | None) -> bool:
    """Whether a job in this state is over, or not known any more."""
    return state is None or state in _OVER


def require() -> None:
    """See that jobs can be submitted from here.

    Raises:
        CouplingError: if not.
    """
    if shutil.which("sbatch") is None:
        raise CouplingError(
            "got run.on: slurm, but there is no sbatch on this machine; call the sweep on a login node"
        )
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
