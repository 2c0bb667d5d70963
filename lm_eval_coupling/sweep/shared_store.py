"""Test of a file system's locks, which SQLite needs if several workers share a store."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

_HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def locks_work(folder: Path) -> bool:
    """Return whether a database that a second process locks in ``folder`` is closed to this one.

    That says nothing of other machines that see the same folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            return _is_kept_out(Path(place) / "probe.sqlite")
    except (OSError, sqlite3.Error):
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
