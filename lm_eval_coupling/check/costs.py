"""Seconds and memory that a prompt takes here: alone, and with as many others as there is room for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from lm_eval_coupling.measuring.prompt import groups, measure_prompts
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.memory import memory_of

OFFERED = 64  # prompts, of which as many as fit are measured together


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one batch: prompts, seconds of each, bytes announced, and bytes measured where the device counts them."""

    together: int
    seconds: float
    announced: int
    measured: int | None
    reason: str | None


def costs(model: Any, tokens: Sequence[int], settings: Settings) -> list[Cost]:
    """Of one prompt, and of the largest batch of prompts as long; each after a first time that does not count."""
    prompts = [list(tokens)] * OFFERED
    largest = len(groups(model, prompts, settings)[0])
    return [_cost(model, prompts[:size], settings) for size in sorted({1, largest})]


def _cost(model: Any, prompts: Sequence[Sequence[int]], settings: Settings) -> Cost:
    announced = memory_of(model, rank=settings.ranks[-1], seq=len(prompts[0]), prompts=len(prompts))
    counts = model.device.type == "cuda"
    for _ in range(2):
        if counts:
            torch.cuda.synchronize(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
        start = time.perf_counter()
        records = measure_prompts(model, prompts, -1, settings)
        if counts:
            torch.cuda.synchronize(model.device)
        taken = time.perf_counter() - start
    measured = None
    if counts:
        measured = torch.cuda.max_memory_allocated(model.device) - torch.cuda.memory_allocated(
            model.device
        )
    reasons = {record.reason for record in records if record.normalized_miscoupling is None}
    return Cost(
        together=len(prompts),
        seconds=taken / len(prompts),
        announced=announced.total,
        measured=measured,
        reason="; ".join(map(str, reasons)) or None,
    )
