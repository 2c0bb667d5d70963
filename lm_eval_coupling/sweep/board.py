"""Display of a sweep at work: a live table on a terminal, else a line for each change."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from lm_eval_coupling.console import terminal_console
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.status import Status, progress
from lm_eval_coupling.sweep.units import Unit

_COLORS = {
    "done": "green",
    "running": "cyan",
    "waiting": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "missing": "dim",
}
_FIRST = ("failed", "stopped", "running", "waiting", "missing", "done")
_REPORT_SECONDS = 30.0


@dataclass(frozen=True)
class _Line:
    state: str
    detail: str
    since: float
    seconds: float


class Board:
    """Display of the states of all units, which any thread may change."""

    def __init__(
        self, plan: Plan, statuses: Iterable[Status], console: Console | None = None
    ) -> None:
        """Start with the states in which a survey found the units."""
        self.plan, self.console = plan, console or terminal_console(stderr=True)
        self._lines = {
            s.unit.name: _Line(s.state, s.detail, time.monotonic(), s.seconds) for s in statuses
        }
        self._units = {unit.name: unit for unit in plan.units}
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._reported: dict[str, str] = {}
        self._last_report = time.monotonic()

    def set(
        self, unit: Unit, state: str, detail: str | None = "", seconds: float | None = None
    ) -> None:
        """Change a unit's state; the same state and detail again change nothing."""
        with self._lock:
            old = self._lines[unit.name]
            if (old.state, old.detail) == (state, detail or ""):
                return
            present = time.monotonic()
            if seconds is None:
                seconds = present - old.since if old.state == "running" else old.seconds
            self._lines[unit.name] = _Line(state, detail or "", present, seconds)
        if self._live is None and old.state != state:
            words = f"{state} ({detail})" if detail else state
            self.say(f"{time.strftime('%H:%M:%S')} {unit.label}: {words}")

    def say(self, text: str) -> None:
        """Print a remark."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(self) -> None:
        """Print the progress of running units every half minute, unless a live table shows it."""
        seconds = time.monotonic() - self._last_report
        if self._live is not None or seconds < _REPORT_SECONDS:
            return
        self._last_report = time.monotonic()
        with self._lock:
            running = [name for name, line in self._lines.items() if line.state == "running"]
        for name in running:
            detail = self._current(name, self._lines[name]).detail
            if self._reported.get(name) != detail:
                self._reported[name] = detail
                self.say(f"{time.strftime('%H:%M:%S')} {self._units[name].label}: {detail}")

    def __enter__(self) -> Board:
        """Show the table if the console is a terminal."""
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self) -> Table:
        """Make a table of as many units as fit, those that run or have failed first."""
        with self._lock:
            lines = dict(self._lines)
        counts = Counter(line.state for line in lines.values())
        title = ", ".join(f"{counts[state]} {state}" for state in _COLORS if counts[state])
        table = Table(title=escape(f"{self.plan.output}: {title}"), title_justify="left")
        for column in ("unit", "state", "s", ""):
            table.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
        room = max(3, self.console.height - 6)
        shown = set(sorted(lines, key=lambda name: _FIRST.index(lines[name].state))[:room])
        for name in [name for name in lines if name in shown]:
            line = self._current(name, lines[name])
            seconds = f"{line.seconds:.0f}" if line.seconds else ""
            detail = line.detail.splitlines()[0][:120] if line.detail else ""
            state = f"[{_COLORS[line.state]}]{line.state}[/]"
            table.add_row(escape(self._units[name].label), state, seconds, escape(detail))
        if len(shown) < len(lines):
            table.add_row(f"and {len(lines) - len(shown)} more", "", "", "")
        return table

    def _current(self, name: str, line: _Line) -> _Line:
        if line.state != "running":
            return line
        detail = line.detail or progress(self.plan.folder(self._units[name]) / "log.txt")
        return replace(line, detail=detail, seconds=time.monotonic() - line.since)


def matrix(
    plan: Plan,
    statuses: Sequence[Status],
    estimates: dict[str, dict[str, Any]],
    console: Console,
) -> Table:
    """Return a table of units × tasks, to print on ``console``: what is done, what the rest takes.

    On a terminal too narrow for a column a task, tasks are counted. Elsewhere ``console`` is made
    wide enough, so that no name is cut.
    """
    names = [
        task.name if task.num_fewshot is None else f"{task.name} ({task.num_fewshot}-shot)"
        for task in plan.tasks
    ]
    table = _matrix(plan, statuses, estimates, names)
    wide = console.options.update(max_width=100_000)
    width = Measurement.get(console, wide, table).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)
    elif width > console.width:
        table = _matrix(plan, statuses, estimates, None)
    return table


def _matrix(
    plan: Plan,
    statuses: Sequence[Status],
    estimates: dict[str, dict[str, Any]],
    names: Sequence[str] | None,
) -> Table:
    """Make the table with a column for each task name, or with one column of counts for None."""
    table = Table(title=escape(str(plan.output)), title_justify="left")
    tasks = ["tasks done"] if names is None else map(escape, names)
    for column in ("unit", *tasks, "state", "memory, GB", "seconds"):
        table.add_column(column, overflow="fold")
    for status in statuses:
        missing = {task.name for task in status.results.missing}
        own = [task.name for task in plan.tasks_of(status.unit)]
        if names is None:
            cells = [f"{len(own) - len(missing)} of {len(own)}"]
        else:
            done = {name: "done" for name in own if name not in missing}
            none = {task.name: "–" for task in plan.tasks if task.name not in own}
            cells = [(done | none).get(task.name, "") for task in plan.tasks]
        estimate = estimates.get(status.unit.name, {})
        numbers = [
            f"{estimate[key]:.3g}" if estimate.get(key) is not None else "?"
            for key in ("gigabytes", "seconds")
        ]
        state = f"[{_COLORS[status.state]}]{status.state}[/]"
        table.add_row(escape(status.unit.label), *cells, state, *numbers)
    return table


def trouble(statuses: Sequence[Status]) -> Iterator[str]:
    """Yield state and reason of each unit that is not done, and its log on a line of its own."""
    for status in statuses:
        if status.state != "done":
            reason = escape(f": {status.detail}" if status.detail else "")
            state = f"[{_COLORS[status.state]}]{status.state}[/]"
            yield f"{escape(status.unit.label)} is {state}{reason}"
            if status.log.exists():
                yield f"    {escape(str(status.log))}"
