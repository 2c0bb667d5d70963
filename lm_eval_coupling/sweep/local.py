"""Sweep on this machine: one worker a device, or several that share the processor's cores."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence

from lm_eval_coupling.numerics.cores import usable_cores
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.plan import Local, Plan
from lm_eval_coupling.sweep.status import look
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import Outcome, Worker

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_AGAIN_SECONDS, _LOOK_SECONDS = 1.0, 0.1


def run(
    plan: Plan, units: Sequence[Unit], board: Board, command: Sequence[str] | None = None
) -> None:
    """Work on units until none is left; one that fails does not stop the others.

    On Ctrl-C, runs in progress are asked to end and to write their results. A second Ctrl-C ends
    them at once. ``command`` is that of :class:`~lm_eval_coupling.sweep.work.Worker`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when all runs have ended.
    """
    assert isinstance(plan.run, Local)
    waiting: queue.Queue[Unit] = queue.Queue()
    for unit in units:
        waiting.put(unit)
    stop = threading.Event()
    workers = [Worker(plan, variables, command) for variables in slots(plan.run, len(units))]
    # Not `Thread.join`: it takes a thread for ended if Ctrl-C arrives while it waits.
    ended = [threading.Event() for _ in workers]
    for worker, end in zip(workers, ended, strict=True):
        arguments = (worker, waiting, board, stop, end)
        threading.Thread(target=_work, args=arguments, daemon=True).start()
    interrupts = 0
    while not all(end.is_set() for end in ended):
        try:
            time.sleep(_LOOK_SECONDS)
            board.report()
        except KeyboardInterrupt:
            interrupts += 1
            stop.set()
            for worker in workers:
                (worker.stop if interrupts == 1 else worker.kill)()
            if interrupts == 1:
                board.say(
                    "stopping: runs write their results (Ctrl-C again: at once); "
                    "the same command resumes later"
                )
    if interrupts:
        raise KeyboardInterrupt


def _work(
    worker: Worker,
    waiting: queue.Queue[Unit],
    board: Board,
    stop: threading.Event,
    end: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            try:
                unit = waiting.get_nowait()
            except queue.Empty:
                return
            _work_on(unit, worker, waiting, board, stop)
    finally:
        end.set()


def _work_on(
    unit: Unit, worker: Worker, waiting: queue.Queue[Unit], board: Board, stop: threading.Event
) -> None:
    board.set(unit, "running")
    try:
        outcome = worker.run(unit)
    except Exception as error:  # The other units go on whatever the error is.
        outcome = Outcome(state="failed", reason=f"{type(error).__name__}: {error}")
    if outcome.state == "busy":  # A killed sweep has left it running.
        board.set(unit, "running", "in a process of an earlier sweep")
        waiting.put(unit)
        stop.wait(_AGAIN_SECONDS)
        return
    is_done = outcome.state == "done"
    detail = look(worker.plan, unit, {}).detail if is_done else outcome.reason
    board.set(unit, outcome.state, detail, outcome.seconds)


def slots(run: Local, most: int = 1024) -> list[dict[str, str]]:
    """Return the variables of each of at most ``most`` workers: its device and its threads."""
    devices: tuple[str | None, ...] = run.devices or tuple(visible_devices()) or (None,)
    count = min(run.workers or len(devices), most)
    variables: list[dict[str, str]] = []
    for number in range(count):
        device = devices[number % len(devices)]
        # Nothing is hidden if no device is seen: those of other makers obey the same variable.
        own = {} if device is None else {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        if run.threads or count > 1:
            share = run.threads or max(1, usable_cores() // count)
            names = [name for name in _THREADS if run.threads or name not in run.environment]
            own |= dict.fromkeys(names, str(share))
        variables.append(own)
    return variables


def visible_devices() -> list[str]:
    """Return the NVIDIA devices that a child would see, without loading torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(count)]
