"""Tests of a place before any work: a folder in it, and locks, which a shared store needs."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """Make a temporary folder in ``place``, or where ``place`` would be made if it does not exist.

    No other folder is made: the missing ones get stand-ins of the same names in the temporary one.

    Yields:
        A folder that can stand for ``place``; it is removed afterwards with all that is in it.

    Raises:
        OSError: if ``place`` is no folder, or none can be made there.
        ValueError: if its name cannot be that of a folder.
    """
    existing = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    with tempfile.TemporaryDirectory(dir=existing) as temporary:
        folder = Path(temporary) / place.relative_to(existing)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def locks_work(folder: Path) -> bool:
    """Return whether a database that a second process locks in ``folder`` is closed to this one.

    That says nothing of other machines that see the same folder. It need not exist.
    """
    try:
        with temporary_folder(folder) as place:
            return _is_kept_out(place / "probe.sqlite")
    except (OSError, ValueError, sqlite3.Error):
        return False


def _is_kept_out(file: Path) -> bool:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        held = other.stdout.readline().strip() == "held"
        kept_out = held and not _can_write(file)
        other.stdin.close()
        other.wait()
    return kept_out and _can_write(file)


def _can_write(file: Path) -> bool:
    connection = sqlite3.connect(file, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("ROLLBACK")
        return True
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
