"""How much memory this process may still take, on the host and on a device.

What a machine has free is no measure where a container or a batch system sets a limit, and a process that goes beyond one is
killed without a word. Several processes of one job on one machine share what is free there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CACHE = re.compile(r"^(?:total_)?inactive_file (\d+)$", re.MULTILINE)


def free(device: torch.device) -> int:
    """Bytes that this process may still take on ``device``, those included that torch holds there for its next tensors."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        available, _ = backend.mem_get_info(device)
        return available + backend.memory_reserved(device) - backend.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_on_host()


def free_on_host() -> int:
    """Bytes of main memory: what is available, within every limit that is set, shared by the job's processes here."""
    limits = [psutil.virtual_memory().available, *_left_by_cgroups()]
    if (job := _left_by_slurm()) is not None:
        limits.append(job)
    return max(0, min(limits)) // processes_here()


def processes_here() -> int:
    """How many processes of this job run on this machine, as torchrun and accelerate say."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


def _left_by_cgroups() -> Iterator[int]:
    """The limit less what is used, of each group of processes around this one that has one, of version 1 or 2."""
    for folder, names in _own_groups():
        limit, used = (_number(folder / name) for name in names)
        if (
            limit is not None and used is not None and limit < 1 << 60
        ):  # version 1 writes a huge number for none
            yield limit - used + _reclaimable(folder)


def _own_groups() -> Iterator[tuple[Path, tuple[str, str]]]:
    second, first = (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    roots = [
        (_CGROUPS, second),
        (_CGROUPS / "memory", first),
    ]  # a container often sees its own group as the root
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, names = roots[controllers == "memory"]
            inside = Path(path.lstrip("/"))
            yield from (
                (root / part, names) for part in (inside, *inside.parents) if part != Path()
            )
    yield from roots


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _reclaimable(folder: Path) -> int:
    """Files kept in memory for as long as nobody else needs it."""
    try:
        found = _CACHE.findall((folder / "memory.stat").read_text())
    except OSError:
        return 0
    return max(map(int, found), default=0)


def _left_by_slurm() -> int | None:
    """What a SLURM job was given on this machine, less what this process and its kin hold; it may enforce that late."""
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
    if not megabytes:  # all there is
        return None
    return (megabytes << 20) - psutil.Process().memory_info().rss * processes_here()
