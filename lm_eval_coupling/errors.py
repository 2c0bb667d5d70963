"""What goes wrong: with a request (:class:`CouplingError`), or with one prompt among others (:class:`Reason`)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence


class CouplingError(ValueError):
    """A request that cannot be served as asked; the message says what was got, what was expected and what to do."""


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
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
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
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE)


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
