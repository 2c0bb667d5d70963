"""Command `sweep`: read a plan, do what is missing, and report what remains."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lm_eval_coupling.console import terminal_console
from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.sweep import board, checks, cluster, local, slurm, state
from lm_eval_coupling.sweep.forecast import estimates
from lm_eval_coupling.sweep.lock import Held, lock
from lm_eval_coupling.sweep.plan import Local, Plan, PlanError, Slurm, read
from lm_eval_coupling.sweep.status import Status, look


def sweep(
    file: Path | str,
    *,
    dry_run: bool = False,
    download: bool = False,
    check: bool = False,
    command: Sequence[str] | None = None,
    console: Console | None = None,
) -> int:
    """Carry out a plan, or only look at it.

    Args:
        file: the plan.
        dry_run: check it; show units × tasks, what exists, and the memory and time of the rest.
        download: check it and fetch models and data sets into the caches.
        check: only show what is missing or failed, why, and where the log is.
        command: the command of a run; see :class:`~lm_eval_coupling.sweep.work.Worker`.
        console: the console to print on; stdout by default.

    Returns:
        The exit code: 0 if everything is done (or the look found no problem), else 1.

    Raises:
        CouplingError: if the plan is wrong.
    """
    console = console or terminal_console(soft_wrap=False)
    try:
        plan = read(file)
    except PlanError as error:
        raise (error if check else checks.add_checks(error)) from None
    if isinstance(plan.run, Slurm):
        cluster.require_configuration()
    statuses = survey(plan)
    if check:
        return _report(console, plan, statuses)
    if dry_run or download:
        facts = checks.check(plan, download=download)
        if dry_run:
            forecast = estimates(plan, statuses, facts)
            console.print(board.matrix(plan, statuses, forecast, console))
        else:
            console.print(
                f"models and data of {len(plan.units)} units are in the caches", highlight=False
            )
        return 0
    if isinstance(plan.run, Slurm):
        cluster.require()
    if not checks.writable(plan) or not plan.output.exists():
        checks.check(plan)  # Before the lock, whose folder a refused plan would leave behind.
    with _alone(plan):
        missing = [status.unit for status in statuses if status.state != "done"]
        if missing:
            checks.check(plan)
        for unit in plan.units:
            state.write_json(plan.folder(unit) / state.FACTS, unit.facts)
        if missing:
            with _interrupts(), board.Board(plan, statuses) as display:
                work = local.run if isinstance(plan.run, Local) else slurm.run
                work(plan, missing, display, command)
    return _report(console, plan, survey(plan))


def survey(plan: Plan) -> list[Status]:
    """Find the states of all units."""
    queue = cluster.jobs() if isinstance(plan.run, Slurm) else {}
    return [look(plan, unit, queue) for unit in plan.units]


def _report(console: Console, plan: Plan, statuses: Sequence[Status]) -> int:
    remaining = [status for status in statuses if status.state != "done"]
    for line in board.trouble(statuses):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{len(statuses) - len(remaining)} of {len(statuses)} units are done in {plan.output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 1 if remaining else 0


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Allow one sweep at a time in a folder."""
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        with lock(plan.output / ".lock"):
            yield
    except Held:
        raise CouplingError(
            f"got output: {plan.output}, in which another sweep is at work; "
            "wait for it, or look with --check"
        ) from None
    except OSError as error:
        raise CouplingError(
            f"got output: {plan.output}, which cannot be used ({why(error)}); choose another"
        ) from None


@contextmanager
def _interrupts() -> Iterator[None]:
    """Treat a request to end, and a lost terminal, as Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        # `nohup` has switched hanging up off, and means it.
        before = {
            number: signal.signal(number, interrupt)
            for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN
        }
        # Shells start background jobs of scripts with Ctrl-C ignored. Runs would inherit that, and
        # could not be asked to end: with a handler that does nothing they start with the default.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    except ValueError:
        pass  # Only the main thread may set handlers.
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
