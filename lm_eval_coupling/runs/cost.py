"""The cost of measuring in words: memory from shapes, seconds from the prompts so far."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.cores import SPINS, waiting_is_chosen
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel

_RECENT = 15  # batches whose median is the pace
_SECONDS = 10.0  # of measuring before the load of the machine is judged
_SHARE = 0.5  # of the usable cores below which measuring is slowed down


def load_average() -> float | None:
    """Return the number of processes that ran or waited for a core in the last minute.

    None where the system does not count them.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Pace:
    """Seconds of a prompt and use of the cores, from the batches of prompts that are done.

    The first batch also loads libraries and allocates memory. Its time counts only until there is
    another.
    """

    def __init__(
        self,
        cores: int,
        *,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
        load: Callable[[], float | None] = load_average,
    ) -> None:
        """Start the clocks.

        Args:
            cores: number of cores that measuring uses.
            wall: clock in seconds.
            cpu: clock of the CPU seconds that this process has used on all cores.
            load: load average of the machine.
        """
        self._cores, self._wall, self._cpu, self._load = cores, wall, cpu, load
        self._start = self._last = wall()
        self._cpu_start = cpu()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._batches, self._has_warned = 0, False

    def add(self, prompts: int) -> None:
        """Count a batch of prompts that has just ended."""
        if self._batches == 1:
            self._seconds.clear()
        last, self._last = self._last, self._wall()
        self._seconds.append((self._last - last) / prompts)
        self._batches += 1

    @property
    def seconds(self) -> float:
        """Median seconds of a prompt over the recent batches."""
        return median(self._seconds)

    def slowed_by(self) -> str | None:
        """Describe, once, that other work on the machine slows down measuring.

        The load must exceed the number of cores: that measuring uses few of them may as well be due
        to steps that take one core and leave the others idle.

        Returns:
            A sentence; None before it is known, after it was returned, and on a machine that is not
            busy.
        """
        elapsed, n_cores = self._last - self._start, os.cpu_count() or 1
        if self._has_warned or elapsed < _SECONDS:
            return None
        used, load = (self._cpu() - self._cpu_start) / elapsed, self._load()
        if load is None or load <= n_cores or used >= _SHARE * self._cores:
            return None
        self._has_warned = True
        sentence = (
            f"the machine is busy: {load:.0f} processes want its {n_cores} cores, and measuring "
            f"got {used:.1f} of the {self._cores} that it may use"
        )
        if waiting_is_chosen(os.environ):
            return sentence
        return f"{sentence}; GOMP_SPINCOUNT={SPINS} in the environment makes it faster there"


def memory_needed(
    model: ResidualModel, batches: Sequence[Sequence[Sequence[int]]], settings: Settings
) -> str:
    """Describe the memory that the largest batch of prompts takes beside the model."""
    size = {"rank": settings.ranks[-1], "itemsize": DTYPES[settings.dtype].itemsize}
    shapes = {(max(map(len, batch)), len(batch)) for batch in batches}
    needed = (memory_of(model, seq=seq, prompts=prompts, **size) for seq, prompts in shapes)
    return f"measuring takes {max(needed, key=lambda memory: memory.total)}"


def seconds_needed(
    model: ResidualModel, measured: Sequence[PromptCoupling], left: int, settings: Settings
) -> str:
    """Return in words the seconds of the first prompts by measure, and those of ``left`` more.

    A batch takes less time than its prompts one by one, so the estimate is an upper bound.
    """
    first = max(measured, key=lambda record: record.seconds)
    measures = [
        f"{name} {duration(result.seconds)}{_extra(model, first, settings, name)}"
        for name, result in first.results.items()
        if result.seconds > 0
    ]
    subject = "a first prompt"
    if len(measured) > 1:
        subject = f"each of the first {len(measured)} prompts, together"
    lengths = [len(record.tokens) for record in measured]
    shortest, longest = min(lengths), max(lengths)
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    text = f"{subject} of {tokens} tokens took {duration(first.seconds)} ({', '.join(measures)})"
    if left:
        text += f"; the other {left} take up to {duration(left * first.seconds)}"
    return text


def _extra(model: ResidualModel, first: PromptCoupling, settings: Settings, name: str) -> str:
    alone = dataclasses.replace(settings, measures=(name,))
    try:
        jacobians, megabytes = alone.extra(model.n_layers, model.d_model, first.position)
    except CouplingError:
        return ""  # the prompt lacks a token that the measure needs; its record says so
    if not jacobians:
        return ""
    return f" with {jacobians} more Jacobians, {megabytes:.0f} MB of them at a time"


def duration(seconds: float) -> str:
    """Write seconds for a reader, such as ``1.3 s``, ``12 min`` or ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
