"""What a command needs of its surroundings before it prints or draws."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.safe_text import for_terminal

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # exit code after Ctrl-C, also if everything measured was saved

# Errors of writing that come without the name of a file.
_UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EBADF)


def prepare_surroundings() -> None:
    """Mend what would keep a command from printing or drawing, or make it slow."""
    open_closed_streams()
    log_safely()
    replace_unprintable_characters()
    forget_backend_of_a_notebook()
    if os.environ.get("COLUMNS", "1").strip("0") == "":  # rich would print nothing
        del os.environ["COLUMNS"]
    # Numbers of runs are millions of lasting objects: to search them for cycles as often as Python
    # does takes a tenth of the time.
    gc.set_threshold(50_000, 20, 20)


def require_process_folders() -> None:
    """Require a working directory, and a folder for temporary files.

    In a deleted directory MKL ends the process without a reason. Without a temporary folder,
    libraries of lm-eval cannot be imported.

    Raises:
        CouplingError: if one of them is missing.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise CouplingError(
            f"got a working directory that cannot be used ({why(error)}); change to another one"
        ) from None
    try:
        tempfile.gettempdir()
    except OSError:
        raise CouplingError(
            "got no folder in which temporary files can be written; set TMPDIR to one"
        ) from None


def terminal_console(**options: Any) -> Console:
    """Return a console of rich that leaves a closed output to :func:`end_after`, as ``print`` does.

    By itself rich ends the process with code 1.

    Args:
        **options: those of rich's own class.
    """
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 called while BrokenPipeError is handled

    return _Console(**options)


def replace_unprintable_characters() -> None:
    """Print `?` for characters that the output cannot encode, such as × on a Windows console."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def forget_backend_of_a_notebook() -> None:
    """Unset matplotlib's backend: commands draw files, and importing one that is missing fails.

    A notebook's kernel sets it for its own environment, and for the commands that a cell calls.
    """
    if os.environ.get("MPLBACKEND", "agg").lower() != "agg":
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


def say(sentence: str, code: int) -> int:
    """Print why a command ends on stderr, and return its exit code."""
    print(f"lm-eval-coupling: {for_terminal(sentence)}", file=sys.stderr)
    return code


def end_of_run(interrupted: bool, problem: str) -> int:
    """Return the exit code after a run, and say what could not be written."""
    if interrupted:
        return INTERRUPTED
    return say(problem, 1) if problem else 0


def end_after(error: OSError) -> int:
    """Return the exit code after an error of writing or of a named file, told in a sentence.

    Raises:
        OSError: if it is another one, such as an error of the network.
    """
    if isinstance(error, BrokenPipeError) or error.errno in _UNWRITABLE:
        # What stdout still holds back would fail once more at the end.
        with contextlib.suppress(OSError, ValueError):  # it may be an object of a caller
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif error.filename is None:
        raise error
    if isinstance(error, BrokenPipeError):  # The reader, such as `head`, has ended.
        return 0
    place = error.filename or "an output"
    return say(f"got {place}, which cannot be used ({why(error)}); choose another place", 2)
