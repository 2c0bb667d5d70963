"""Units on this machine: one worker a device, or several that share the processor's cores."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence

from lm_eval_coupling.numerics.cores import cores
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.plan import Local, Plan
from lm_eval_coupling.sweep.units import Unit
from lm_eval_coupling.sweep.work import COMMAND, Outcome, Worker

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_AGAIN_SECONDS, _LOOK_SECONDS = 1.0, 0.1


def run(plan: Plan, units: Sequence[Unit], board: Board, command: Sequence[str] = COMMAND) -> None:
    """Work on units until none is left; one that fails does not stop the others.

    On Ctrl-C, runs in progress are asked to end and to write what they have; a second one ends them at once.

    Args:
        plan: the plan.
        units: those to be done.
        board: is told how it goes.
        command: see :class:`~lm_eval_coupling.sweep.work.Worker`.

    Raises:
        KeyboardInterrupt: when all has ended after Ctrl-C.
    """
    assert isinstance(plan.run, Local)
    todo: queue.Queue[Unit] = queue.Queue()
    for unit in units:
        todo.put(unit)
    stop = threading.Event()
    workers = [Worker(plan, environment, command) for environment in slots(plan.run)[: len(units)]]
    ended = [
        threading.Event() for _ in workers
    ]  # `join` takes a thread for ended that Ctrl-C met it waiting for
    for worker, end in zip(workers, ended, strict=True):
        threading.Thread(target=_work, args=(worker, todo, board, stop, end), daemon=True).start()
    interrupts = 0
    while not all(end.is_set() for end in ended):
        try:
            time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            interrupts += 1
            stop.set()
            for worker in workers:
                (worker.stop if interrupts == 1 else worker.kill)()
            if interrupts == 1:
                board.say(
                    "stopping: runs write what they have (again Ctrl-C: at once); the same command goes on later"
                )
    if interrupts:
        raise KeyboardInterrupt


def _work(
    worker: Worker,
    todo: queue.Queue[Unit],
    board: Board,
    stop: threading.Event,
    end: threading.Event,
) -> None:
    try:
        _work_on_all(worker, todo, board, stop)
    finally:
        end.set()


def _work_on_all(
    worker: Worker, todo: queue.Queue[Unit], board: Board, stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            unit = todo.get_nowait()
        except queue.Empty:
            return
        board.set(unit, "running")
        try:
            outcome = worker.run(unit)
        except Exception as error:  # whatever it is, the other units are not to suffer from it
            outcome = Outcome(state="failed", reason=f"{type(error).__name__}: {error}")
        if (
            outcome.state == "busy"
        ):  # what a killed sweep has left running: it is looked at again when it has ended
            board.set(unit, "running", "in a process of an earlier sweep")
            todo.put(unit)
            stop.wait(_AGAIN_SECONDS)
        else:
            board.set(unit, outcome.state, outcome.reason, outcome.seconds)


def slots(run: Local) -> list[dict[str, str]]:
    """The environment of each worker: the device that it may see, and its share of the threads."""
    devices: tuple[str | None, ...] = run.devices or tuple(visible_devices()) or (None,)
    count = run.workers or len(devices)
    made: list[dict[str, str]] = []
    for number in range(count):
        device = devices[number % len(devices)]
        # Where none is seen nothing is hidden: devices of other makers listen to the same variable.
        environment = (
            {} if device is None else {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        )
        if run.threads or count > 1:
            share = run.threads or max(1, cores() // count)
            environment |= {
                name: str(share) for name in _THREADS if run.threads or name not in run.environment
            }
        made.append(environment)
    return made


def visible_devices() -> list[str]:
    """The NVIDIA devices that a child would see, without loading torch."""
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
    return [
        str(number)
        for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))
    ]
