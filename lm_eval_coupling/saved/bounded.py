"""Reading of text files that may be anything: pipes and huge files are refused, not read."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MOST = 1 << 29  # bytes; lm-eval's results of thousands of tasks have a hundredth
# Levels of JSON; lm-eval writes about ten, and Python's parsers end at a thousand.
_DEEPEST = 100
_TOO_DEEP = f"its parts are nested more than {_DEEPEST} deep"


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


def read_json(file: Path) -> Any:
    """Return the value of a JSON file (:func:`read_text`, :func:`parse_json`).

    Raises:
        OSError: if it is no regular file, is too large, or cannot be read.
        ValueError: if it is no JSON in UTF-8, is nested too deep, or names a member twice.
    """
    return parse_json(read_text(file))


def parse_json(text: str) -> Any:
    """Parse JSON of bounded depth.

    Returns:
        Its value; halves of surrogate pairs, which have no UTF-8, are replaced by "?".

    Raises:
        ValueError: if it is no JSON, is nested too deep, or names a member twice, of which other
            parsers keep the last without a word.
    """
    try:
        value = json.loads(text, object_pairs_hook=_members_once)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, depth = [value], 0
    while level := [member for part in level for member in _members(part)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(_TOO_DEEP)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        written = json.dumps(value, ensure_ascii=False)
        value = json.loads(written.encode("utf-8", "replace").decode("utf-8"))
    return value


def _members_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice in one object")
    return members


def _members(value: Any) -> Iterable[Any]:
    """Return the parts of a value that may be nested further."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]
