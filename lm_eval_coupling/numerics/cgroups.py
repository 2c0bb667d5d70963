"""Control groups of Linux, version 1 and 2, that limit this process. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def own_groups(controller: str) -> Iterator[Path]:
    """Yield the folder of every group around this process that may limit ``controller``.

    A container often sees its own group as the root, so the roots come too. Whether a folder
    belongs to version 1 or 2 shows in the names of its files.
    """
    first = _ROOT / controller
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root, inside = first if controllers else _ROOT, Path(path.lstrip("/"))
            yield from (root / part for part in (inside, *inside.parents) if part != Path())
    yield from (_ROOT, first)


def read_number(file: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or it says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
