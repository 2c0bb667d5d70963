"""Wall time that can be trusted: warmed up, synchronised, several candidates in turn so that drift
meets all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def in_turn(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each function over ``repeats`` rounds A B A B …, after ``warmup`` rounds
    that do not count.
    """
    rounds = [
        {name: seconds(function) for name, function in functions.items()}
        for _ in range(warmup + repeats)
    ]
    return {name: statistics.median(r[name] for r in rounds[warmup:]) for name in functions}
