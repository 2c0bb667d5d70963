"""What a unit may take: memory from its shape, time from units of the plan that are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.status import Status

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_START_SECONDS = 15.0  # Python, torch, lm-eval and the data of its tasks


def estimates(
    plan: Plan, found: Sequence[Status], models: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By unit ``gigabytes`` (weights and Jacobians) and ``seconds``; None where nothing is known.

    Seconds are those of units of this plan that are done, in proportion to the number of parameters: all units have the same
    documents.

    Args:
        plan: the plan.
        found: where each unit stands.
        models: ``d_model, n_layers, n_params, dtype`` by model.

    Returns:
        Both of every unit, by its name.
    """
    known = [
        (status.seconds, models[status.unit.model].get("n_params"))
        for status in found
        if _timed(status, models)
    ]
    made: dict[str, dict[str, Any]] = {}
    for status in found:
        about = models.get(status.unit.model, {})
        made[status.unit.name] = {
            "gigabytes": gigabytes(about, str(plan.coupling.get("dtype", "float32"))),
            "seconds": status.seconds
            if status.state == "done"
            else _seconds(about.get("n_params"), known),
        }
    return made


def gigabytes(about: Mapping[str, Any], dtype: str) -> float | None:
    """Weights as they are loaded, and the Jacobians of one prompt with as much again while they are worked on."""
    sizes = [about.get(name) for name in ("n_params", "n_layers", "d_model")]
    if any(size is None for size in sizes):
        return None
    parameters, layers, width = (float(size) for size in sizes if size is not None)
    weights = parameters * _BYTES.get(str(about.get("dtype")), 4)
    return (weights + 2 * layers * width**2 * _BYTES.get(dtype, 4)) / 1e9


def _timed(status: Status, models: Mapping[str, Mapping[str, Any]]) -> bool:
    return (
        status.state == "done"
        and status.seconds > 0
        and bool(models.get(status.unit.model, {}).get("n_params"))
    )


def _seconds(parameters: float | None, known: Sequence[tuple[float, Any]]) -> float | None:
    if parameters is None or not known:
        return None
    return _START_SECONDS + median(
        max(0.0, seconds - _START_SECONDS) * parameters / other for seconds, other in known
    )
