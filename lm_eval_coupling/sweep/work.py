"""Work on one unit: lm-eval in a process of its own, with smaller batches if memory runs out."""

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
from lm_eval_coupling.sweep import answers, state
from lm_eval_coupling.sweep.child_environment import environment
from lm_eval_coupling.sweep.done import done, set_aside
from lm_eval_coupling.sweep.lock import Held, lock
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.plan_secrets import hide
from lm_eval_coupling.sweep.reasons import ending, out_of_memory, reason, stopped, tail
from lm_eval_coupling.sweep.request import NOTE, configuration
from lm_eval_coupling.sweep.units import Unit

# The command `lm_eval`, also if its start-up hook is missing or forbidden.
COMMAND = (sys.executable, "-m", "lm_eval_coupling.cli", "run")
_MEASURE = (*COMMAND[:-1], "measure")
GRACE_SECONDS = 30
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """State that a unit is left in: done, failed, stopped, or busy (another process has it)."""

    state: str
    reason: str | None = None
    seconds: float = 0.0
    out_of_memory: bool = False


class Worker:
    """Worker that runs units one at a time; any thread may call :meth:`stop` and :meth:`kill`."""

    def __init__(
        self,
        plan: Plan,
        variables: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        *,
        patience: float = 1.0,
        job: str | None = None,
    ) -> None:
        """Prepare the environment of lm-eval.

        Args:
            plan: the plan.
            variables: further variables of the process, such as the device that it may see.
            command: the command before ``--config FILE``; by default lm-eval's, or the one that
                measures from samples.
            patience: seconds to wait for a unit that another process holds.
            job: the SLURM job that this worker belongs to.
        """
        self.plan, self.patience, self.job = plan, patience, job
        self.command = command or (COMMAND if plan.samples is None else _MEASURE)
        self.environment = environment(plan.environment, variables or {}, {"PYTHONUNBUFFERED": "1"})
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, unit: Unit, batch_size: Any = None) -> Outcome:
        """Return the state that a unit is left in, with the reason, after doing what it lacks.

        A failure is returned and never raised. ``batch_size`` replaces the plan's.
        """
        folder = self.plan.folder(unit)
        try:
            with lock(folder / state.LOCK, patience=self.patience) as descriptor:
                outcome = self._run(unit, folder, descriptor, batch_size)
                self._write(
                    folder, state=outcome.state, reason=outcome.reason, seconds=outcome.seconds
                )
        except Held:
            return Outcome(state="busy", reason="another process is at work on it")
        except OSError as error:
            return Outcome(state="failed", reason=f"{folder} cannot be used ({why(error)})")
        return outcome

    def stop(self) -> None:
        """End the run in progress, with some time to write its results, and begin no other."""
        self._stopping.set()

    def kill(self) -> None:
        """End the run in progress at once; its measurements are stored as they are made."""
        self._stopping.set()
        _signal(self._process, _KILL)

    def _write(self, folder: Path, **fields: Any) -> None:
        state.write(folder, job=self.job, **fields)

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
        content = configuration(self.plan, unit, missing, batch_size)
        code = self._evaluate(folder, content, descriptor)
        seconds, text = time.monotonic() - start, tail(folder / state.LOG)
        finished = done(self.plan, unit)
        if finished.complete:
            return Outcome(state="done", seconds=seconds)
        if self._stopping.is_set() or stopped(code):
            by = "Ctrl-C or a request to end" if self._stopping.is_set() else ending(code)
            words = f"by {by}; what was measured is kept"
            return Outcome(state="stopped", reason=words, seconds=seconds)
        if code:
            words = reason(text, code)
        else:
            words = finished.why or "lm-eval ended well but left no complete results"
        has_no_memory = code != 0 and out_of_memory(text, code)
        if has_no_memory:
            words = f"out of memory with batch size {batch_size}: {words}"
        return Outcome(state="failed", reason=words, seconds=seconds, out_of_memory=has_no_memory)

    def _evaluate(self, folder: Path, content: Mapping[str, Any], descriptor: int) -> int:
        """Run lm-eval to its end and return its exit code."""
        answers.forget_old(folder, content["metadata"][NOTE])
        file = folder / ("lm_eval.yaml" if self.plan.samples is None else "measure.yaml")
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        command = [*self.command, "--config", str(file)]
        log = folder / state.LOG
        start = f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n"
        with log.open("ab") as output:
            output.write(start.encode("utf-8", "replace"))
            output.flush()
            # A session of its own: Ctrl-C reaches it through us, and what it starts ends with it.
            # It holds the unit's lock too, so that a sweep after a killed one leaves it in peace.
            posix: dict[str, Any] = (
                {"start_new_session": True, "pass_fds": (descriptor,)} if os.name == "posix" else {}
            )
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                **posix,
            ) as self._process:
                size, child = content.get("batch_size"), self._process.pid
                self._write(folder, state="running", batch_size=size, child=child)
                code = self._wait(self._process)
        self._hide_secrets(log)
        return code

    def _hide_secrets(self, log: Path) -> None:
        """Replace secrets that lm-eval, or a library, has printed."""
        if not self.plan.secrets:
            return
        text = log.read_text(encoding="utf-8", errors="surrogateescape")
        hidden = hide(text, self.plan.secrets.values())
        if hidden != text:
            log.write_text(hidden, encoding="utf-8", errors="surrogateescape")

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
    """Return half of a batch size, 1 for a size found by lm-eval, or None if it was 1."""
    try:
        size = int(batch_size)
    except (TypeError, ValueError):
        return 1
    return size // 2 if size > 1 else None


def _signal(process: subprocess.Popen[bytes] | None, number: int) -> None:
    """Send a signal to a process and all that it has started."""
    if process is None or process.returncode is not None:
        return
    try:
        os.killpg(process.pid, number) if os.name == "posix" else process.terminate()
    except ProcessLookupError:
        pass
