"""What a command needs of its surroundings before it prints or draws."""

from __future__ import annotations

import importlib.util
import io
import os
import sys


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
