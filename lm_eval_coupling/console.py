"""What a command needs of its surroundings before it prints or draws."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import sys

from lm_eval_coupling.safe_text import for_terminal


def replace_unprintable_characters() -> None:
    """Print `?` for characters that the output cannot encode, such as × on a Windows console."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def forget_backend_of_a_notebook() -> None:
    """Unset a backend of matplotlib that is not installed here; importing matplotlib would fail.

    A notebook's kernel sets it for its own environment, and for the commands that a cell calls.
    """
    scheme, _, module = os.environ.get("MPLBACKEND", "").partition("://")
    if scheme == "module" and importlib.util.find_spec(module.partition(".")[0] or "-") is None:
        del os.environ["MPLBACKEND"]


def open_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed, as by ``>&-``.

    A file that is opened later would take the number of such a stream, and what a library prints
    there would be written into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


class _SafeFormatter(logging.Formatter):
    """Format of messages on a terminal, which must not obey the names in them."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def log_safely(level: int | None = None) -> None:
    """Print logged messages with control characters written out, unless logging is set up already.

    Args:
        level: from which on messages of measuring are printed; by default warnings.
    """
    if level is None:  # No handler is added: lm-eval adds its own unless there is one.
        if logging.lastResort is not None:
            logging.lastResort.setFormatter(_SafeFormatter())
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("lm_eval.coupling").setLevel(level)
