"""Forecast of a unit's memory from its shape, and of its time from units that are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.status import Status

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_START_SECONDS = 15.0  # Python, torch, lm-eval and the data of its tasks
_PROCESS_GIGABYTES = 1.1  # the same, in memory
_PROMPTS, _MAX_JACOBIANS = 8, 1 << 30  # prompts measured together, and bytes of their Jacobians
_DECOMPOSED = 6 * 8  # matrices in work: six for each of eight decompositions at a time
_TOKENS = 128  # of a typical context, whose logits are formed in float32 and once more as logs


def estimates(
    plan: Plan, statuses: Sequence[Status], models: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the estimated ``gigabytes`` and ``seconds`` of every unit by name, None if not known.

    Seconds are those of done units of this plan in proportion to the number of parameters, because
    all units have the same documents. ``models`` has ``d_model, n_layers, n_params, dtype`` by
    model.
    """
    timed = [
        (status.seconds, models[status.unit.model].get("n_params"))
        for status in statuses
        if _is_timed(status, models)
    ]
    result: dict[str, dict[str, Any]] = {}
    for status in statuses:
        facts = models.get(status.unit.model, {})
        seconds: float | None = status.seconds
        if status.state != "done":
            seconds = _seconds(facts.get("n_params"), timed)
        result[status.unit.name] = {"gigabytes": gigabytes(plan, facts), "seconds": seconds}
    return result


def gigabytes(plan: Plan, facts: Mapping[str, Any]) -> float | None:
    """Estimate the memory of a run: process, weights, logits, and Jacobians being decomposed."""
    sizes = [facts.get(name) for name in ("n_params", "n_layers", "d_model")]
    if any(size is None for size in sizes):
        return None
    parameters, layers, width = (float(size) for size in sizes if size is not None)
    weights = parameters * _BYTES.get(str(facts.get("dtype")), 4)
    batch = plan.lm_eval.get("batch_size", 1)
    batch = batch if isinstance(batch, int) else 1
    logits = 8 * batch * _TOKENS * float(facts.get("vocab_size") or 0)
    total = _PROCESS_GIGABYTES * 1e9 + weights + logits
    if plan.measures:
        matrix = width**2 * _BYTES.get(str(plan.coupling.get("dtype", "float32")), 4)
        together = max(1, min(_PROMPTS, _MAX_JACOBIANS // (layers * matrix)))
        total += together * layers * matrix + _DECOMPOSED * matrix
        if plan.coupling.get("untrained") is not None:
            total += weights
    return total / 1e9


def _is_timed(status: Status, models: Mapping[str, Mapping[str, Any]]) -> bool:
    facts = models.get(status.unit.model, {})
    return status.state == "done" and status.seconds > 0 and bool(facts.get("n_params"))


def _seconds(parameters: float | None, timed: Sequence[tuple[float, Any]]) -> float | None:
    if parameters is None or not timed:
        return None
    return _START_SECONDS + median(
        max(0.0, seconds - _START_SECONDS) * parameters / other for seconds, other in timed
    )
