"""The cost of measuring in words: memory from shapes, seconds from the first prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel


def memory_needed(
    model: ResidualModel, batches: Sequence[Sequence[Sequence[int]]], settings: Settings
) -> str:
    """Describe the memory that the largest batch of prompts takes beside the model."""
    size = {"rank": settings.ranks[-1], "itemsize": DTYPES[settings.dtype].itemsize}
    needed = (
        memory_of(model, seq=max(map(len, batch)), prompts=len(batch), **size) for batch in batches
    )
    return f"measuring takes {max(needed, key=lambda memory: memory.total)}"


def seconds_needed(
    model: ResidualModel, measured: Sequence[PromptCoupling], left: int, settings: Settings
) -> str:
    """Describe the seconds of the first prompts by measure, and of ``left`` more.

    A batch takes less time than its prompts one by one, so the estimate is an upper bound.

    Returns:
        A text for the log.
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
