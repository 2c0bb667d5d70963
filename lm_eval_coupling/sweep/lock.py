"""One worker a unit and one sweep a folder: locks that the system lets go when their holder dies, however it dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]


class Held(Exception):
    """Somebody else holds the lock."""


@contextmanager
def lock(file: Path, patience: float = 0.0) -> Iterator[int]:
    """Hold ``file``; the file descriptor can be handed to a child, which then holds it as well until it ends.

    A file system without locks keeps nobody out.

    Args:
        file: made if it is missing.
        patience: seconds to wait for it, such as for somebody who only looks whether it is held.

    Yields:
        The file descriptor.

    Raises:
        Held: if another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience
        while not _taken(descriptor):
            if time.monotonic() > until:
                raise Held(str(file))
            time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        pass
    return True


def held(file: Path) -> bool:
    """Whether some process holds ``file`` now."""
    if not file.exists():
        return False
    try:
        with lock(file):
            return False
    except Held:
        return True
    except OSError:
        return False
