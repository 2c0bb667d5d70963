"""State of SLURM's jobs and limits of the cluster, read from SLURM's own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep.child_environment import environment

# States in which a job is over. In any other it runs or will run, for example between its being
# queued again and its start.
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
_DEFAULT_ARRAY = 1000  # SLURM's own default allows 1001 elements.


@dataclass(frozen=True)
class Job:
    """Job in the queue: its state, and why it waits."""

    state: str
    why: str = ""

    @property
    def running(self) -> bool:
        """True if the job has a node."""
        return self.state in ("RUNNING", "COMPLETING")

    def __str__(self) -> str:
        return f"{self.state} ({self.why})" if self.why else self.state


def jobs() -> dict[str, Job] | None:
    """Return this user's jobs that are not over by name, or None if the cluster does not answer.

    Elements of arrays are listed one by one.
    """
    listed = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %T %r")
    if listed is None:
        return None
    queue: dict[str, Job] = {}
    for line in listed.splitlines():
        name, state, why = (*line.split(maxsplit=2), "", "", "")[:3]
        if state:
            queue[name] = Job(state, "" if why.strip() == "None" else why.strip())
    return queue


def state(job: str) -> str | None:
    """Return a job's state, or None once the cluster has forgotten the job."""
    words = (_ask("scontrol", "show", "job", "--oneliner", job) or "").split()
    states = (word.removeprefix("JobState=") for word in words if word.startswith("JobState="))
    return next(states, None)


def over(state: str | None) -> bool:
    """Return whether a job in this state is over, or forgotten."""
    return state is None or state in _OVER


def largest_array() -> int:
    """Return how many elements an array of jobs may have on this cluster; 1 if none may."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.M)
    return max(1, min(int(match[1]), _DEFAULT_ARRAY)) if match else _DEFAULT_ARRAY


def require_configuration() -> None:
    """Check that SLURM's configuration is there: its commands look for a missing one for a minute.

    Raises:
        CouplingError: if SLURM_CONF names no file.
    """
    file = os.environ.get("SLURM_CONF")
    if file and not os.path.isfile(file):
        raise CouplingError(
            f"got SLURM_CONF={file}, which is no file; name SLURM's configuration, or unset the "
            "variable"
        )


def require() -> None:
    """Raise CouplingError unless sbatch and submitit are installed here."""
    if shutil.which("sbatch") is None:
        raise CouplingError(
            "got run.on: slurm, but this machine has no sbatch; call the sweep on a login node"
        )
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise CouplingError(
            "got run.on: slurm, which needs submitit; "
            "install it with pip install 'lm-eval-coupling[slurm]'"
        ) from None


def why_silent() -> str:
    """Return the last line that ``squeue`` has to say when it lists nothing."""
    answer = _run("squeue", "--noheader", "--me")
    lines = "no answer within a minute" if answer is None else answer.stderr
    return (lines.strip().splitlines() or ["no reason given"])[-1]


def _ask(*command: str) -> str | None:
    answer = _run(*command)
    return None if answer is None or answer.returncode else answer.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment(),
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
