"""One JSON object a line, as lm-eval writes its samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one at a time; none if there is no such file.

    A line that is no object, such as the one that a killed run left unfinished, is passed over.

    Yields:
        One object per line.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value
