"""What the last worker on a unit said of it: for people to read. Whether a unit is done is never decided by it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG, RECORD, LOCK, FACTS = "log.txt", "state.json", "lock", "facts.json"


def write(folder: Path, **what: Any) -> None:
    """Replace the record, whole or not at all."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "job": job()}
    write_json(folder / RECORD, about | what)


def read(folder: Path) -> dict[str, Any]:
    """The record; empty where there is none."""
    return read_json(folder / RECORD)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def job() -> str | None:
    """The SLURM job that this process belongs to, in submitit's notation."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    unfinished.replace(file)
