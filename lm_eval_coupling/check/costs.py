"""Seconds and memory of a prompt on this machine, alone and in the largest batch that fits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from lm_eval_coupling.measuring.prompt import groups, measure_prompts
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.memory import memory_of

OFFERED = 64  # Prompts; as many as fit are measured together.


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one batch.

    Attributes:
        together: number of prompts.
        seconds: time of each prompt.
        announced: expected peak memory in bytes.
        measured: peak memory in bytes, where the device counts it.
        reason: why prompts could not be measured, or None.
    """

    together: int
    seconds: float
    announced: int
    measured: int | None
    reason: str | None


def costs(model: Any, tokens: Sequence[int], settings: Settings) -> list[Cost]:
    """Return the costs of one prompt and of the largest batch, each after a first run.

    The first run does not count: it includes start-up costs of the device.
    """
    # Different prompts: equal ones would share a pass.
    prompts = [[*tokens[i:], *tokens[:i]] for i in range(OFFERED)]
    largest = len(groups(model, prompts, settings)[0])
    return [_cost(model, prompts[:size], settings) for size in sorted({1, largest})]


def _cost(model: Any, prompts: Sequence[Sequence[int]], settings: Settings) -> Cost:
    announced = memory_of(model, rank=settings.ranks[-1], seq=len(prompts[0]), prompts=len(prompts))
    is_cuda = model.device.type == "cuda"
    for _ in range(2):
        if is_cuda:
            torch.cuda.synchronize(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
        start = time.perf_counter()
        records = measure_prompts(model, prompts, -1, settings)
        if is_cuda:
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - start
    measured = None
    if is_cuda:
        measured = torch.cuda.max_memory_allocated(model.device) - torch.cuda.memory_allocated(
            model.device
        )
    reasons = {record.reason for record in records if record.normalized_miscoupling is None}
    return Cost(
        together=len(prompts),
        seconds=seconds / len(prompts),
        announced=announced.total,
        measured=measured,
        reason="; ".join(map(str, reasons)) or None,
    )
