"""Memory that this process may still take, on the host and on a device.

A container or a batch system may set a limit below what the machine has free, and kills a process
that exceeds it without a message. Several processes of one job on one machine share what is free
there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lm_eval_coupling.numerics.cgroups import own_groups, read_number

_NO_LIMIT = 1 << 60  # version 1 writes a huge number, not a word
_CACHE = re.compile(r"^(?:total_)?inactive_file (\d+)$", re.MULTILINE)
# Limit and use, of version 2 and of version 1.
_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free(device: torch.device) -> int:
    """Return the bytes that this process may still take on ``device``, torch's reserve included."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        available, _ = backend.mem_get_info(device)
        return available + backend.memory_reserved(device) - backend.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_on_host()


def free_on_host() -> int:
    """Return the bytes of main memory available to this process within every limit.

    Processes of one job on this machine get equal shares.
    """
    limits = [psutil.virtual_memory().available, *_left_by_cgroups()]
    if (job := _left_by_slurm()) is not None:
        limits.append(job)
    return max(0, min(limits)) // processes_here()


def processes_here() -> int:
    """Return the number of this job's processes here, as torchrun and accelerate set it."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


def _left_by_cgroups() -> Iterator[int]:
    """Yield the limit less the use of each control group around this process that has a limit."""
    for folder in own_groups("memory"):
        for limit_file, use_file in _FILES:
            limit = read_number(folder / limit_file)
            if limit is None or limit >= _NO_LIMIT:
                continue
            if (used := read_number(folder / use_file)) is not None:
                yield limit - used + _reclaimable(folder)


def _reclaimable(folder: Path) -> int:
    """Return the bytes of cached files, which the system drops when memory is needed."""
    try:
        sizes = _CACHE.findall((folder / "memory.stat").read_text())
    except OSError:
        return 0
    return max(map(int, sizes), default=0)


def _left_by_slurm() -> int | None:
    """Return what a SLURM job was given on this machine less what its processes hold.

    SLURM may notice an excess late. None outside a job, or if the job has all memory.
    """
    node, cpu, cpus = (
        os.environ.get(f"SLURM_{name}", "")
        for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    if node.isdigit():
        megabytes = int(node)
    elif cpu.isdigit() and cpus.isdigit():
        megabytes = int(cpu) * int(cpus)
    else:
        return None
    if not megabytes:  # SLURM writes 0 for all memory of the node
        return None
    return (megabytes << 20) - psutil.Process().memory_info().rss * processes_here()
