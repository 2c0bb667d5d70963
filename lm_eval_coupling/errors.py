"""What goes wrong: with a request (:class:`CouplingError`), or with one prompt among others (:class:`Reason`)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class CouplingError(ValueError):
    """A request that cannot be served as asked; the message says what was got, what was expected and what to do."""


def shown(value: object) -> str:
    """A wrong argument in a message: one line, of bounded length."""
    return " ".join(repr(value).split())[:80]


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number given in any form that is one, such as 3, ``numpy.int64(3)`` or a tensor of one number.

    Raises:
        CouplingError: for anything else, and below ``low`` or above ``high``.
    """
    try:
        number = (
            None
            if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
            else operator.index(value)
        )
    except (TypeError, RuntimeError):  # the second of a tensor of several
        number = None
    if number is not None and (low is None or number >= low) and (high is None or number <= high):
        return number
    limits = {
        (False, False): "",
        (True, False): f" from {low}",
        (True, True): f" from {low} to {high}",
    }
    expected = limits.get((low is not None, high is not None), f" of at most {high}")
    raise CouplingError(f"got {name}={shown(value)}, expected a whole number{expected}")


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Return a text that is one of those known.

    Raises:
        CouplingError: for anything else.
    """
    if isinstance(value, str) and value in known:
        return value
    listed = (
        f"one of {', '.join(known)}"
        if len(known) < 20
        else f"one of {len(known)}, perhaps {nearest(str(value), known)}"
    )
    raise CouplingError(f"got {name}={shown(value)}, expected {listed}")


def flag(name: str, value: Any) -> bool:
    """Return True or False, in NumPy's or torch's form too. A text is neither: ``"no"`` would count as true.

    Raises:
        CouplingError: for anything else.
    """
    alone = getattr(value, "ndim", 0) == 0 and "bool" in str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or alone or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise CouplingError(f"got {name}={shown(value)}, expected True or False")


def path(name: str, value: Any) -> Path:
    """Return a path of a file or folder.

    Raises:
        CouplingError: for what is no text or path.
    """
    if isinstance(value, str | Path) or (
        hasattr(value, "__fspath__") and isinstance(value.__fspath__(), str)
    ):
        return Path(value)
    raise CouplingError(f"got {name}={shown(value)}, expected a path")


def paths(name: str, value: Any) -> list[Path]:
    """Return one path or several.

    Raises:
        CouplingError: for anything else.
    """
    if isinstance(value, str | Path) or hasattr(value, "__fspath__") or not is_several(value):
        return [path(name, value)]
    return [path(name, one) for one in value]


def is_several(value: Any) -> bool:
    """Whether a value is some in a row: no text, mapping, or array or tensor of one number."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, str | bytes | Mapping)
        and bool(getattr(value, "ndim", 1))
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def why(error: Exception) -> str:
    """What is wrong with a file or folder, in words and on one line: ``there is no such file`` for ``[Errno 2] …``."""
    known: dict[type[Exception], str] = {
        FileNotFoundError: "there is no such file",
        IsADirectoryError: "it is a folder",
        NotADirectoryError: "a part of its path is a file",
        FileExistsError: "a file of that name is there",
        PermissionError: "it is not permitted",
        UnicodeDecodeError: "it is no UTF-8 text",
        json.JSONDecodeError: "it is no JSON",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    if type(error).__name__ == "EmptyDataError":  # of pandas, which is not needed here
        return "it is empty"
    text = (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )
    return " ".join(text.split())[:300]


# What the codes mean, and whether measuring the same prompt again would end the same way: only then is it worth keeping.
CODES = {
    "out_of_memory": ("device or host had no memory left", False),
    "error": ("an unexpected exception, named in the reason", False),
    "refused": ("the settings do not fit this prompt", False),
    "no_such_token": ("the prompt has no token at the measured position", False),
    "not_finite": ("the stream holds NaN or infinity", False),
    "certificate": ("a Jacobian disagrees with the model's own derivative", False),
    "zero_or_low_rank": ("a Jacobian is zero or has fewer than K singular values", True),
    "undefined": ("a formula divides by zero here", True),
    "one_layer": ("a model of one block has no pair of different layers", True),
    "too_short": ("the prompt has too few tokens", True),
}


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something of a prompt is missing or undefined: a ``code`` of ``CODES`` to count by, and words to read."""

    code: str
    words: str

    @property
    def settled(self) -> bool:
        """Whether measuring again would end the same way."""
        return CODES[self.code][1]


class Unmeasurable(Exception):
    """Raised where one prompt cannot be measured; the others are not touched by it."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(words)
        self.reason = Reason(code, words)


# torch raises a plain RuntimeError for it on the host and on some devices.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE
)


def pass_on_lack_of_memory(error: Exception) -> None:
    """Raise ``error`` if memory ran out, whatever its class: fewer prompts at once are the remedy, no slower way."""
    if reason_of(error).code == "out_of_memory":
        raise error


def reason_of(error: Exception) -> Reason:
    """``error`` as a reason: one line, of bounded length."""
    if isinstance(error, Unmeasurable):
        return error.reason
    text = " ".join(str(error).split())[:300]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"} or _OUT_OF_MEMORY.search(text):
        return Reason("out_of_memory", "out of memory")
    if isinstance(error, CouplingError):
        return Reason("refused", text)
    return Reason("error", f"{type(error).__name__}: {text}")
