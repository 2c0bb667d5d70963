"""The processor cores that this process is given, and how its threads wait for each other.

Imports no torch, which reads the environment when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from lm_eval_coupling.numerics.cgroups import own_groups, read_number

# Rounds that a thread of GNU's OpenMP spins at the end of a product before it gives up its core.
# Measured with SmolLM2 and four prompts together on two cores, beside four busy processes: the
# default of 300,000 rounds takes 1.98 times the fair share of time, 10,000 rounds 1.19 times. On a
# quiet machine 10,000 rounds take 5 % more time than the default, none (PASSIVE) 23 %.
SPINS = 10_000


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the rounds that waiting threads spin, unless the user has chosen how they wait.

    Args:
        environment: variables of a process that has not loaded torch yet; changed in place.
    """
    if not waiting_is_chosen(environment):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def waiting_is_chosen(environment: MutableMapping[str, str]) -> bool:
    """Return whether a variable says how threads of OpenMP wait."""
    return "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment


def usable_cores() -> int:
    """Return the number of cores that the scheduler gives to this process, at least 1.

    It is the least of the process's affinity, the quotas of its control groups, SLURM's allotment
    and OMP_NUM_THREADS. A quota of two cores and a half counts as two, one below a core as one.
    """
    # macOS and Windows do not tell which cores a process may use.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    given = min([affinity or os.cpu_count() or 1, *_allotments()])
    if given == 1:
        return 1  # without a look at files
    return max(1, int(min([given, *_quotas()])))


def _allotments() -> Iterator[int]:
    """Yield the number of cores or threads that each variable sets."""
    # SLURM's first is of a task, its second of the whole job on this machine. OMP_NUM_THREADS may
    # be a list, of which the first number is that of the outermost level.
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()
        if text.isdecimal() and int(text):
            yield int(text)


def _quotas() -> Iterator[float]:
    """Yield the quota of each control group around this process, in cores."""
    for folder in own_groups("cpu"):
        quota, period = _read_cpu_max(folder / "cpu.max")
        if quota is None:
            quota = read_number(folder / "cpu.cfs_quota_us")
            period = read_number(folder / "cpu.cfs_period_us")
        # Version 1 of control groups writes -1 for no quota.
        if quota is not None and quota > 0 and period:
            yield quota / period


def _read_cpu_max(file: Path) -> tuple[int | None, int | None]:
    """Return quota and period, both None without a quota.

    Version 2 of control groups writes a line such as ``50000 100000`` or ``max 100000``.
    """
    try:
        quota, period = file.read_text().split()
        return int(quota), int(period)
    except (OSError, ValueError):
        return None, None
