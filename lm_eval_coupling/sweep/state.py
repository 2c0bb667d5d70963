"""State of a unit as its last worker described it, for people; it never decides what is done."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.saved.bounded import read_json as read_any_json

LOG, RECORD, LOCK, FACTS = "log.txt", "state.json", "lock", "facts.json"


def write(folder: Path, job: str | None = None, **fields: Any) -> None:
    """Replace the state in a unit's folder; ``job`` is the SLURM job that works on it, if any."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "job": job}
    write_json(folder / RECORD, about | fields)


def read(folder: Path) -> dict[str, Any]:
    """Return the state in a unit's folder, empty if there is none."""
    return read_json(folder / RECORD)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no regular file that holds one."""
    try:
        content = read_any_json(file) if file.is_file() else None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    unfinished.replace(file)
