"""Errors of a request, reasons why one prompt cannot be measured, and checks of arguments."""

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
    """Request that cannot be served; the message says what was got and expected, and what to do."""


def shown(value: object) -> str:
    """Return a wrong argument as it appears in a message: one line of at most 80 characters."""
    return " ".join(repr(value).split())[:80]


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number, given as ``3``, ``numpy.int64(3)`` or a tensor of one number.

    Raises:
        CouplingError: if it is anything else, is below ``low`` or above ``high``.
    """
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        number = None if is_bool else operator.index(value)
    except (TypeError, RuntimeError):  # A tensor of several numbers raises a RuntimeError.
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


def resolve_token(token: int, seq: int, name: str = "position") -> int:
    """Return the index from 0 of a token of a prompt; a negative ``token`` counts from the end.

    Raises:
        CouplingError: if the prompt has no such token.
    """
    token = whole(name, token)
    if not seq:
        raise CouplingError("got a prompt of no tokens, expected at least one")
    if not -seq <= token < seq:
        raise CouplingError(
            f"got token {token} of a prompt of {seq} tokens, expected {-seq} to {seq - 1}"
        )
    return token % seq


def require_token_ids(ids: Iterable[int], words: int) -> None:
    """Raise CouplingError for a token id that a model of ``words`` tokens does not have."""
    for token in ids:
        if not 0 <= token < words:
            raise CouplingError(
                f"got token id {token} in a prompt, expected 0 to {words - 1} for this model"
            )


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return a text that is one of ``choices``, or raise CouplingError for anything else."""
    if isinstance(value, str) and value in choices:
        return value
    if len(choices) < 20:
        expected = f"one of {', '.join(choices)}"
    else:
        expected = f"one of {len(choices)}, perhaps {nearest(str(value), choices)}"
    raise CouplingError(f"got {name}={shown(value)}, expected {expected}")


def flag(name: str, value: Any) -> bool:
    """Return True or False, given as such, as 0 or 1, or in NumPy's or torch's form.

    Raises:
        CouplingError: if it is anything else; as a text, ``"no"`` would count as true.
    """
    is_array_bool = getattr(value, "ndim", 0) == 0 and "bool" in str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or is_array_bool or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise CouplingError(f"got {name}={shown(value)}, expected True or False")


def path(name: str, value: Any) -> Path:
    """Return a path of a file or folder, with a leading ``~`` replaced by the home folder.

    Raises:
        CouplingError: if it is no text or path, holds a null character, or has no such home.
    """
    if not isinstance(value, str | Path) and not (
        hasattr(value, "__fspath__") and isinstance(value.__fspath__(), str)
    ):
        raise CouplingError(f"got {name}={shown(value)}, expected a path")
    if "\0" in str(value):
        raise CouplingError(f"got {name}={shown(value)}, expected a path without null characters")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise CouplingError(
            f"got {name}={value}, but there is no such home folder; write the path in full"
        ) from None


def paths(name: str, value: Any) -> list[Path]:
    """Return one path or several as a list, or raise CouplingError for anything else."""
    if isinstance(value, str | Path) or hasattr(value, "__fspath__") or not is_several(value):
        return [path(name, value)]
    return [path(name, item) for item in value]


def is_several(value: Any) -> bool:
    """Return whether a value holds several: no text, mapping, or array of no dimension."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, str | bytes | Mapping)
        and bool(getattr(value, "ndim", 1))
    )


def nearest(name: str, choices: Sequence[str]) -> str:
    """Return the choice that was probably meant by ``name``."""
    return difflib.get_close_matches(name[:200], choices, n=1, cutoff=0)[0]


_FILE_ERRORS: dict[type[Exception], str] = {
    FileNotFoundError: "there is no such file",
    IsADirectoryError: "it is a folder",
    NotADirectoryError: "a part of its path is a file",
    FileExistsError: "a file of that name is there",
    PermissionError: "it is not permitted",
    UnicodeDecodeError: "it is no UTF-8 text",
    json.JSONDecodeError: "it is no JSON",
}


def why(error: Exception) -> str:
    """Describe what is wrong with a file on one line, such as ``there is no such file``."""
    for kind, words in _FILE_ERRORS.items():
        if isinstance(error, kind):
            return words
    if type(error).__name__ == "EmptyDataError":  # pandas raises it and need not be imported here.
        return "it is empty"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return message_of(text or type(error).__name__)


def message_of(error: object, most: int = 300) -> str:
    """Return an error's message, or else the name of its class, on one line of bounded length."""
    return " ".join(str(error).split())[:most] or type(error).__name__


# Codes of reasons: what each means, and whether measuring the same prompt again would end alike.
# Only then is the reason worth keeping in the store.
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
    """Reason for a missing value of a prompt: a ``code`` of ``CODES`` to count by, and words."""

    code: str
    words: str

    @property
    def settled(self) -> bool:
        """True if measuring again would end the same way."""
        return CODES[self.code][1]


class Unmeasurable(Exception):
    """Failure of one prompt that leaves the other prompts as they are."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(words)
        self.reason = Reason(code, words)


# torch raises a plain RuntimeError when the host, or some devices, have no memory left.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE
)


def pass_on_lack_of_memory(error: Exception) -> None:
    """Raise ``error`` if memory ran out: fewer prompts at once help then, a slower method does not.

    Raises:
        Exception: ``error`` itself.
    """
    if reason_of(error).code == "out_of_memory":
        raise error


def reason_of(error: Exception) -> Reason:
    """Return the reason that ``error`` stands for, on one line of bounded length."""
    if isinstance(error, Unmeasurable):
        return error.reason
    text = " ".join(str(error).split())[:300]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"} or _OUT_OF_MEMORY.search(text):
        return Reason("out_of_memory", "out of memory")
    if isinstance(error, CouplingError):
        return Reason("refused", text)
    return Reason("error", f"{type(error).__name__}: {text}")
