"""Files of one JSON object a line, as lm-eval writes its samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST = 1 << 27  # characters of a line; a longer one ends the reading


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file one at a time.

    A line that is no object, such as the last one of a killed run, is passed over.

    Yields:
        One object per line; none if there is no such regular file.
    """
    try:
        is_file = file.is_file()
    except OSError:  # a name that is too long for the file system
        return
    if not is_file:
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        # Not `for line in lines`: a file of zeros has one line, which may not fit into memory.
        while line := lines.readline(_LONGEST):
            if len(line) == _LONGEST:
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value
