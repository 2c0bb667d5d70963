"""What measuring costs, told before it is spent: memory from the shapes, seconds from the first prompts."""

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
    """In words, what the largest of these batches of prompts takes beside the model."""
    size = {"rank": settings.ranks[-1], "itemsize": DTYPES[settings.dtype].itemsize}
    needed = (
        memory_of(model, seq=max(map(len, batch)), prompts=len(batch), **size) for batch in batches
    )
    return f"measuring takes {max(needed, key=lambda memory: memory.total)}"


def seconds_needed(
    model: ResidualModel, measured: Sequence[PromptCoupling], left: int, settings: Settings
) -> str:
    """In words, what each measure took of the prompt or prompts measured first, and how long ``left`` more will take.

    Several prompts at once take less time than one after the other, so the estimate is on the safe side; the bar knows
    better as soon as a batch is done.

    Returns:
        Words for the log.
    """
    first = max(measured, key=lambda record: record.seconds)
    of_measures = [
        f"{name} {_duration(found.seconds)}{_extra(model, first, settings, name)}"
        for name, found in first.results.items()
        if found.seconds > 0
    ]
    who = (
        "a first prompt"
        if len(measured) == 1
        else f"each of the first {len(measured)} prompts, together"
    )
    shortest, longest = (of(len(record.tokens) for record in measured) for of in (min, max))
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    what = f"{who} of {tokens} tokens took {_duration(first.seconds)} ({', '.join(of_measures)})"
    return (
        f"{what}; the other {left} take up to {_duration(left * first.seconds)}" if left else what
    )


def _extra(model: ResidualModel, first: PromptCoupling, settings: Settings, name: str) -> str:
    try:
        jacobians, megabytes = dataclasses.replace(settings, measures=(name,)).extra(
            model.n_layers, model.d_model, first.position
        )
    except CouplingError:
        return ""  # tokens that the prompt does not have: its record says so
    return (
        f" with {jacobians} more Jacobians, {megabytes:.0f} MB of them at a time"
        if jacobians
        else ""
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
