"""One call of lm-eval's command line for our model: its errors in a sentence, its exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lm_eval_coupling.console import end_after
from lm_eval_coupling.errors import CouplingError, nearest
from lm_eval_coupling.harness.lm_eval_internals import is_command_running
from lm_eval_coupling.safe_text import for_terminal

MODEL = "coupling-hf"
_INTERRUPTED = "interrupted; prompts measured before are kept in the store"


@dataclass
class Command:
    """The state of one call of lm-eval's command line, which itself returns nothing.

    Attributes:
        is_ours: True if the model is ``coupling-hf``.
        tasks: the task manager, for the names of tasks.
        interrupted: True if Ctrl-C ended the measuring early.
        problems: why something that was asked for was not written.
        unprinted: results of ours whose summary is not printed yet.
    """

    is_ours: bool = False
    tasks: Any = None
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)
    unprinted: dict[str, Any] | None = None


_running: ContextVar[Command] = ContextVar("lm_eval_command")


def current_command() -> Command:
    """Return the running command; without one, as in a notebook, a new one that nobody reads."""
    return _running.get(Command())


def join_running_command() -> Command | None:
    """Start to report for a running lm-eval command that the start-up hook did not see begin.

    From now on a `CouplingError` or Ctrl-C that ends the process prints one sentence in place of
    a traceback. The exit code is Python's own.

    Returns:
        The state of the command; None if no command runs, or if it has a state already.
    """
    if _running.get(None) is not None or not is_command_running():
        return None
    command = Command(is_ours=True)
    _running.set(command)
    usual = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, CouplingError):
            _say(str(error))
        elif isinstance(error, KeyboardInterrupt):
            _say(_INTERRUPTED)
        else:
            usual(kind, error, trace)

    sys.excepthook = say
    return command


def execute_plainly(execute: Callable, harness: Any, args: Any) -> Any:
    """Execute a command; a mistake or Ctrl-C becomes one sentence and an exit code."""
    command = Command(is_ours=getattr(args, "model", None) == MODEL)
    token = _running.set(command)
    try:
        returned = execute(harness, args)
    except CouplingError as error:
        raise _exit(2, str(error)) from None
    except KeyboardInterrupt:
        if not command.is_ours:
            raise
        raise _exit(130, _INTERRUPTED) from None
    except ValueError as error:
        sentence = _about_tasks(error, command.tasks)
        if not (command.is_ours and sentence):
            raise
        raise _exit(2, sentence) from None
    except OSError as error:
        # A closed or full output: lm-eval prints its tables once everything is saved.
        if not command.is_ours or error.filename is not None:
            raise
        if code := end_after(error):
            raise SystemExit(code) from None
        returned = None
    finally:
        _running.reset(token)
    if command.interrupted:
        # The results are written, but nobody is to take them for complete.
        raise SystemExit(130)
    if command.problems:
        raise _exit(1, "; ".join(command.problems))
    return returned


def parse_args_with_hint(parse_args: Callable, harness: Any) -> Any:
    """Parse a command line; after ``coupling_ranks=10,30``, name the plus sign."""
    try:
        return parse_args(harness)
    except SystemExit:
        if any(re.search(r"coupling_\w+=\d+,\d", word) for word in sys.argv):
            _say("join several numbers by a plus sign, as in coupling_ranks=10+30")
        raise


def _about_tasks(error: ValueError, manager: Any) -> str:
    """Turn lm-eval's error about unknown tasks into a sentence; "" for any other error."""
    _, mark, names = str(error).partition("Tasks not found: ")
    if not mark or not (available := getattr(manager, "all_tasks", None)):
        return ""
    nearest_names = ", ".join(nearest(name, available) for name in names.split(", "))
    return f"got --tasks {names}, which lm-eval does not know; did you mean {nearest_names}?"


def _exit(code: int, sentence: str) -> SystemExit:
    _say(sentence)
    return SystemExit(code)


def _say(sentence: str) -> None:
    """Print one sentence; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"lm-eval-coupling: {for_terminal(sentence)}", file=sys.stderr)
