"""The work on one unit: lm-eval in a process of its own, tried again with smaller batches where memory runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lm_eval_coupling.errors import why
from lm_eval_coupling.sweep import answers
from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.done import done, set_aside
from lm_eval_coupling.sweep.lock import Held, lock
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.reasons import ending, out_of_memory, reason, stopped, tail
from lm_eval_coupling.sweep.request import NOTE, configuration
from lm_eval_coupling.sweep.units import Unit

# What `lm_eval` itself does, where its start-up hook may be missing or forbidden.
COMMAND = (sys.executable, "-m", "lm_eval_coupling.cli", "run")
GRACE_SECONDS = 30
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the work on a unit ended: ``done``, ``failed``, ``stopped`` or ``busy`` (another process has it)."""

    state: str
    reason: str | None = None
    seconds: float = 0.0
    out_of_memory: bool = False


class Worker:
    """Runs units, one at a time; :meth:`stop` and :meth:`kill` may be called from anywhere."""

    def __init__(
        self,
        plan: Plan,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
        patience: float = 1.0,
    ) -> None:
        """Prepare.

        Args:
            plan: the plan.
            environment: further variables of the process, such as the device that it may see.
            command: what to run before ``--config FILE``.
            patience: seconds to wait for a unit that another process holds.
        """
        self.plan, self.command, self.patience = plan, command, patience
        self.environment = {
            **os.environ,
            **plan.run.environment,
            **(environment or {}),
            "PYTHONUNBUFFERED": "1",
        }
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, unit: Unit, batch_size: Any = None) -> Outcome:
        """Do what is missing of a unit, and say how it went; what goes wrong with it is never raised.

        Args:
            unit: the model and revision.
            batch_size: instead of the plan's.

        Returns:
            The state that the unit is left in, and the reason.
        """
        folder = self.plan.folder(unit)
        try:
            with lock(folder / record.LOCK, patience=self.patience) as descriptor:
                outcome = self._run(unit, folder, descriptor, batch_size)
                record.write(
                    folder, state=outcome.state, reason=outcome.reason, seconds=outcome.seconds
                )
        except Held:
            return Outcome(state="busy", reason="another process is at work on it")
        except OSError as error:
            return Outcome(state="failed", reason=f"{folder} cannot be used ({why(error)})")
        return outcome

    def stop(self) -> None:
        """End the run in progress, with some time to write what it has, and begin no other."""
        self._stopping.set()

    def kill(self) -> None:
        """End the run in progress at once; its measurements are stored as they are made."""
        self._stopping.set()
        _signal(self._process, _KILL)

    def _run(self, unit: Unit, folder: Path, descriptor: int, batch_size: Any) -> Outcome:
        size = self.plan.lm_eval.get("batch_size", 1) if batch_size is None else batch_size
        outcome = self._attempt(unit, folder, descriptor, size)
        if outcome.out_of_memory and (smaller := half(size)) is not None:
            outcome = self._attempt(unit, folder, descriptor, smaller)
        if outcome.state == "done":
            answers.forget(folder)
            set_aside(self.plan, unit)
        return outcome

    def _attempt(self, unit: Unit, folder: Path, descriptor: int, batch_size: Any) -> Outcome:
        if not (missing := done(self.plan, unit).missing):
            return Outcome(state="done")
        start = time.monotonic()
        code = self._process_of(
            folder, configuration(self.plan, unit, missing, batch_size), descriptor
        )
        seconds, text = time.monotonic() - start, tail(folder / record.LOG)
        if (found := done(self.plan, unit)).complete:
            return Outcome(state="done", seconds=seconds)
        if self._stopping.is_set() or stopped(code):
            why = "by Ctrl-C or its like" if self._stopping.is_set() else f"by {ending(code)}"
            return Outcome(
                state="stopped", reason=f"{why}; what was measured is kept", seconds=seconds
            )
        why = (
            reason(text, code)
            if code
            else found.why or "lm-eval ended well but left no complete results"
        )
        memory = code != 0 and out_of_memory(text, code)
        if memory:
            why = f"out of memory with batch size {batch_size}: {why}"
        return Outcome(state="failed", reason=why, seconds=seconds, out_of_memory=memory)

    def _process_of(self, folder: Path, made: Mapping[str, Any], descriptor: int) -> int:
        """Run lm-eval to its end; returns its exit code."""
        answers.forget_old(folder, made["metadata"][NOTE])
        file = folder / "lm_eval.yaml"
        file.write_text(
            yaml.safe_dump(dict(made), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        command = [*self.command, "--config", str(file)]
        with (folder / record.LOG).open("ab") as log:
            log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            log.flush()
            # A group of its own: Ctrl-C reaches it through us, and what it starts ends with it. It holds the unit's lock
            # too, so that a sweep that comes after a killed one leaves it in peace.
            posix: dict[str, Any] = (
                {"start_new_session": True, "pass_fds": (descriptor,)} if os.name == "posix" else {}
            )
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                **posix,
            ) as self._process:
                record.write(
                    folder, state="running", batch_size=made["batch_size"], child=self._process.pid
                )
                return self._wait(self._process)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        steps: list[tuple[int, float]] = [
            (signal.SIGINT, GRACE_SECONDS),
            (signal.SIGTERM, 5),
            (_KILL, 60),
        ]
        until = 0.0
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self._stopping.is_set() and steps and time.monotonic() > until:
                    number, patience = steps.pop(0)
                    _signal(process, number)
                    until = time.monotonic() + patience


def half(batch_size: Any) -> int | None:
    """Half of a batch; 1 where a size that lm-eval found itself was too large; None if nothing is left to halve."""
    try:
        size = int(batch_size)
    except (TypeError, ValueError):
        return 1
    return size // 2 if size > 1 else None


def _signal(process: subprocess.Popen[bytes] | None, number: int) -> None:
    """Signal a process with all that it has started."""
    if process is None or process.returncode is not None:
        return
    try:
        os.killpg(process.pid, number) if os.name == "posix" else process.terminate()
    except ProcessLookupError:
        pass
