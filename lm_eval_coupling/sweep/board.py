"""What the sweep shows while it works: one live table on a terminal, else a line for each change."""

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
from rich.table import Table

from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.status import Status, progress
from lm_eval_coupling.sweep.units import Unit

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "waiting": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "missing": "dim",
}
_FIRST = ("failed", "stopped", "running", "waiting", "missing", "done")


@dataclass(frozen=True)
class _Line:
    state: str
    detail: str
    since: float
    seconds: float


class Board:
    """The states of all units, told from any thread."""

    def __init__(self, plan: Plan, found: Iterable[Status], console: Console | None = None) -> None:
        """Start from what was found."""
        self.plan, self.console = plan, console or Console(stderr=True)
        self._lines = {
            s.unit.name: _Line(s.state, s.detail, time.monotonic(), s.seconds) for s in found
        }
        self._units = {unit.name: unit for unit in plan.units}
        self._lock = threading.Lock()
        self._live: Live | None = None

    def set(
        self, unit: Unit, state: str, detail: str | None = "", seconds: float | None = None
    ) -> None:
        """A unit's new state; the same one again changes nothing."""
        with self._lock:
            old = self._lines[unit.name]
            if (old.state, old.detail) == (state, detail or ""):
                return
            now = time.monotonic()
            took = (
                seconds
                if seconds is not None
                else now - old.since
                if old.state == "running"
                else old.seconds
            )
            self._lines[unit.name] = _Line(state, detail or "", now, took)
        if self._live is None and old.state != state:
            text = f"{time.strftime('%H:%M:%S')} {unit.label}: {state}" + (
                f" ({detail})" if detail else ""
            )
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A remark."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Board:
        """Show the table, if there is a terminal to show it on."""
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self) -> Table:
        """As many units as the terminal has lines, those at work and in trouble first."""
        with self._lock:
            lines = dict(self._lines)
        counts = Counter(line.state for line in lines.values())
        title = ", ".join(f"{counts[state]} {state}" for state in _COLOURS if counts[state])
        made = Table(title=f"{self.plan.output}: {title}", title_justify="left", expand=False)
        for column in ("unit", "state", "s", ""):
            made.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
        shown = sorted(lines, key=lambda name: _FIRST.index(lines[name].state))[
            : max(3, self.console.height - 6)
        ]
        for name in [name for name in lines if name in set(shown)]:
            line = self._current(name, lines[name])
            colour, seconds = _COLOURS[line.state], f"{line.seconds:.0f}" if line.seconds else ""
            made.add_row(
                escape(self._units[name].label),
                f"[{colour}]{line.state}[/]",
                seconds,
                escape(line.detail.splitlines()[0][:120] if line.detail else ""),
            )
        if len(shown) < len(lines):
            made.add_row(f"and {len(lines) - len(shown)} more", "", "", "")
        return made

    def _current(self, name: str, line: _Line) -> _Line:
        if line.state != "running":
            return line
        detail = line.detail or progress(self.plan.folder(self._units[name]) / "log.txt")
        return replace(line, detail=detail, seconds=time.monotonic() - line.since)


def matrix(plan: Plan, found: Sequence[Status], estimates: dict[str, dict[str, Any]]) -> Table:
    """Units × tasks: what is there and what is to be done, with what it may take."""
    tasks = [
        task.name if task.num_fewshot is None else f"{task.name} ({task.num_fewshot}-shot)"
        for task in plan.tasks
    ]
    made = Table(
        "unit",
        *tasks,
        "state",
        "memory, GB",
        "seconds",
        title=str(plan.output),
        title_justify="left",
    )
    for status in found:
        missing = {task.name for task in status.found.missing}
        cells = ["" if task.name in missing else "done" for task in plan.tasks]
        guess = estimates.get(status.unit.name, {})
        numbers = [
            f"{guess[key]:.3g}" if guess.get(key) is not None else "?"
            for key in ("gigabytes", "seconds")
        ]
        colour = _COLOURS[status.state]
        made.add_row(escape(status.unit.label), *cells, f"[{colour}]{status.state}[/]", *numbers)
    return made


def trouble(found: Sequence[Status]) -> Iterator[str]:
    """Of each unit that is not done its state, the reason, and on a line of its own, to be copied, the log."""
    for status in found:
        if status.state != "done":
            colour, reason = (
                _COLOURS[status.state],
                escape(f": {status.detail}" if status.detail else ""),
            )
            yield f"{escape(status.unit.label)} is [{colour}]{status.state}[/]{reason}"
            if status.log.exists():
                yield f"    {escape(str(status.log))}"
