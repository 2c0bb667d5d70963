"""Locks for one worker per unit and one sweep per folder, released when their holder dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: nobody is kept out.
    fcntl = None  # type: ignore[assignment]


class Held(Exception):
    """Refusal of a lock that another process holds."""


@contextmanager
def lock(file: Path, patience: float = 0.0) -> Iterator[int]:
    """Hold ``file`` as a lock. On a file system without locks nobody is kept out.

    Args:
        file: made if it is missing.
        patience: seconds to wait for it, for example for a process that only looks at it.

    Yields:
        The file descriptor; a child that inherits it holds the lock as well until it ends.

    Raises:
        Held: if another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience
        while not _try_to_lock(descriptor):
            if time.monotonic() > until:
                raise Held(str(file))
            time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # This file system has no locks.
        pass
    return True


def held(file: Path) -> bool:
    """Return whether some process holds ``file`` now."""
    if not file.exists():
        return False
    try:
        with lock(file):
            return False
    except Held:
        return True
    except OSError:
        return False
