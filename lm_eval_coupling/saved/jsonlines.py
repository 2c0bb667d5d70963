"""Files of one JSON object a line, as lm-eval writes its samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval_coupling.saved.bounded import parse_json

_LONGEST = 1 << 27  # bytes of a line; a longer one ends the reading


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file one at a time.

    A line that is no object in UTF-8, such as the last one of a killed run, is passed over.

    Yields:
        One object per line; none if there is no such regular file.
    """
    for line in read_lines(file):
        try:
            value = parse_json(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def read_lines(file: Path) -> Iterator[bytes]:
    """Read the lines of a file one at a time, up to one that may not fit into memory.

    Yields:
        Lines with their ends; none if there is no such regular file.
    """
    try:
        is_file = file.is_file()
    except OSError:  # a name that is too long for the file system
        return
    if not is_file:
        return
    with file.open("rb") as lines:
        # Not `for line in lines`: a file of zeros has one line.
        while (line := lines.readline(_LONGEST)) and len(line) < _LONGEST:
            yield line
