"""The command `sweep`: read the plan, see what is there, do what is missing, say what remains."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.sweep import board, checks, cluster, local, slurm
from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.forecast import estimates
from lm_eval_coupling.sweep.lock import Held, lock
from lm_eval_coupling.sweep.plan import Local, Plan, PlanError, Slurm, read
from lm_eval_coupling.sweep.status import Status, look
from lm_eval_coupling.sweep.work import COMMAND


def sweep(
    file: Path | str,
    *,
    dry_run: bool = False,
    download: bool = False,
    check: bool = False,
    command: Sequence[str] = COMMAND,
    console: Console | None = None,
) -> int:
    """Carry out a plan, or one of the looks at it.

    Args:
        file: the plan.
        dry_run: check it and show units × tasks, what is there, and what memory and time the rest may take.
        download: check it and fetch models and data sets into the caches.
        check: only say what is missing or failed, why, and where the log is.
        command: what runs lm-eval; see :class:`~lm_eval_coupling.sweep.work.Worker`.
        console: where to print; stdout by default.

    Returns:
        The exit code: 0 if everything is there (or the look found nothing wrong), 1 if something is missing or failed.

    Raises:
        CouplingError: if the plan is wrong.
    """
    console = console or Console(soft_wrap=False)
    try:
        plan = read(file)
    except PlanError as wrong:
        raise (wrong if check else checks.with_the_world(wrong)) from None
    found = survey(plan)
    if check:
        return _report(console, plan, found)
    if dry_run or download:
        facts = checks.check(plan, download=download)
        if dry_run:
            console.print(board.matrix(plan, found, estimates(plan, found, facts)))
        else:
            console.print(
                f"models and data of {len(plan.units)} units are in the caches", highlight=False
            )
        return 0
    _require(plan)
    if not checks.writable(plan):
        checks.check(plan)  # says so, with all else that is wrong
    with _alone(plan):
        for unit in plan.units:
            record.write_json(plan.folder(unit) / record.FACTS, unit.facts)
        missing = [status.unit for status in found if status.state != "done"]
        if missing:
            checks.check(plan)
            with _signals(), board.Board(plan, found) as shown:
                if isinstance(plan.run, Local):
                    local.run(plan, missing, shown, command)
                else:
                    slurm.run(plan, missing, shown, command)
    return _report(console, plan, survey(plan))


def survey(plan: Plan) -> list[Status]:
    """Where all units stand."""
    queue = cluster.jobs() if isinstance(plan.run, Slurm) else {}
    return [look(plan, unit, queue) for unit in plan.units]


def _report(console: Console, plan: Plan, found: Sequence[Status]) -> int:
    remaining = [status for status in found if status.state != "done"]
    for line in board.trouble(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{len(found) - len(remaining)} of {len(found)} units are done in {plan.output}",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if remaining else 0


def _require(plan: Plan) -> None:
    if isinstance(plan.run, Slurm):
        cluster.require()


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """One sweep at a time in a folder."""
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        with lock(plan.output / ".lock"):
            yield
    except Held:
        raise CouplingError(
            f"got output: {plan.output}, in which another sweep is at work; wait for it, or look with --check"
        ) from None
    except OSError as error:
        raise CouplingError(
            f"got output: {plan.output}, which cannot be used ({why(error)}); choose another"
        ) from None


@contextmanager
def _signals() -> Iterator[None]:
    """To be told to end, or to lose the terminal, is as Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before: Mapping[int, Any] = {}
    try:
        names = [
            number
            for name in ("SIGTERM", "SIGHUP")
            if (number := getattr(signal, name, None)) is not None
        ]
        # `nohup` has switched hanging up off, and means it.
        before = {
            number: signal.signal(number, interrupt)
            for number in names
            if signal.getsignal(number) != signal.SIG_IGN
        }
    except ValueError:
        pass  # not in the main thread
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
