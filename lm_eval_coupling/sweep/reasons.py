"""Reason why a run failed, as one sentence from the end of its log."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from lm_eval_coupling.safe_text import one_line

_OURS = re.compile(r"^lm-eval-coupling: (.+)$")
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*$")
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|CUBLAS_STATUS_ALLOC_FAILED"
    r"|can(?:'t|not) allocate memory|oom[-_ ]kill",
    re.IGNORECASE,
)
_LENGTH = 300


def tail(log: Path, size: int = 20_000) -> str:
    """Return the end of a log, with each state of a progress bar on a line of its own."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", "replace").replace("\r", "\n")
    except OSError:
        return ""


def reason(text: str, code: int | None) -> str:
    """Return our last sentence in a log, else its last error, else how the process ended."""
    lines = [one_line(line) for line in text.splitlines() if line.strip()]
    for pattern in (_OURS, _ERROR):
        for line in reversed(lines):
            if match := pattern.match(line):
                return match[match.lastindex or 0][:_LENGTH]
    return f"ended with {ending(code)}" + (f": {lines[-1][:_LENGTH]}" if lines else "")


def ending(code: int | None) -> str:
    """Describe an exit code."""
    if code is None:
        return "no exit code"
    try:
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def out_of_memory(text: str, code: int) -> bool:
    """Return whether memory ran out, of the device or of the host, which kills the process."""
    return code in (-9, 137) or bool(_MEMORY.search(text))


def stopped(code: int) -> bool:
    """Return whether a process was stopped by somebody rather than by a fault."""
    return -code in (signal.SIGINT, signal.SIGTERM, *_USER_SIGNALS) or code in (130, 143)


_USER_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
