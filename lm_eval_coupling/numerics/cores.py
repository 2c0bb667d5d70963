"""The processor as this process may use it. No torch."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores that this process may use."""
    # Not every system knows which those are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
