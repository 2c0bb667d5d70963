"""Reading of whole text files that may be anything: pipes and huge files are refused, not read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MOST = 1 << 29  # bytes; lm-eval's results of thousands of tasks have a hundredth


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file of at most ``MOST`` bytes.

    Args:
        file: the file, or a link to it.
        encoding: of the text.

    Raises:
        OSError: if it is no regular file, is too large, or cannot be read.
        UnicodeDecodeError: if it is of another encoding.
    """
    status = os.stat(file)  # before it is opened: a pipe without a writer would wait for ever
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError("it is no regular file")
    if status.st_size > MOST:
        raise OSError(f"it has {status.st_size / 1e9:.1f} GB, at most {MOST / 1e9:.1f} are read")
    return file.read_bytes().decode(encoding)
