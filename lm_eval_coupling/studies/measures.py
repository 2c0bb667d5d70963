"""The measures of a record that studies look at: how to read each, what to call it, where chance lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_eval_coupling.measures.coupling import chance_level

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a prompt, or one for every place in depth.

    ``read`` takes a record and the rank K and returns what stands over which depths: 0 is the input of the first block,
    l the output of block l or the block itself; a number of the whole prompt has the depth NaN. ``column`` is the
    column of the records that it needs; ``of_rank`` tells whether it is a coupling, which has a chance level.
    """

    label: str
    column: str
    read: Callable[[Record, int], tuple[np.ndarray, np.ndarray]]
    of_rank: bool = False
    log: bool = False

    def chance(self, rank: int) -> float:
        """Coupling of unrelated layers, 1 − √(1 − 1/K); NaN for what is no coupling."""
        return 1 - chance_level(rank) if self.of_rank else math.nan


def miscoupling(record: Record, rank: int) -> np.ndarray:
    """m̃[layer, layer'] in float64 with NaN on the diagonal, which is 0 by definition."""
    matrix = record["normalized_miscoupling"][record["ranks"].index(rank)].astype(np.float64)
    np.fill_diagonal(matrix, math.nan)
    return matrix


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is defined; NaN, without a warning, where nothing is."""
    known = np.isfinite(values)
    n = known.sum(axis=axis)
    return np.where(n, np.where(known, values, 0).sum(axis=axis) / np.maximum(n, 1), math.nan)


def _whole(value: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.array([math.nan]), np.array([value], dtype=np.float64)


def _blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1.0, len(values) + 1), np.asarray(values, dtype=np.float64)


def _points(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(0.0, len(values)), np.asarray(values, dtype=np.float64)


def _windows(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Each window at its centre: the first reaches from the input of block 1 to the output of block ``window``."""
    return np.arange(len(values)) + window / 2, np.asarray(values, dtype=np.float64)


def _scalar(label: str, column: str) -> Measure:
    return Measure(label, column, lambda record, rank: _whole(record[column]))


def _of_blocks(label: str, column: str, **kwargs: bool) -> Measure:
    return Measure(label, column, lambda record, rank: _blocks(record[column]), **kwargs)


def _of_points(label: str, column: str, **kwargs: bool) -> Measure:
    return Measure(label, column, lambda record, rank: _points(record[column]), **kwargs)


def _of_windows(label: str, column: str) -> Measure:
    return Measure(label, column, lambda record, rank: _windows(record[column], int(record["window"])))


_PAIRS = "normalized_miscoupling"
MEASURES: dict[str, Measure] = {
    "coupling": Measure("coupling", _PAIRS, lambda r, k: _whole(1 - _mean(miscoupling(r, k))), of_rank=True),
    "layer_coupling": Measure(
        "coupling, its Jacobian in the others' bases",
        _PAIRS,
        lambda r, k: _blocks(1 - _mean(miscoupling(r, k), 1)),
        of_rank=True,
    ),
    "layer_coupling_as_basis": Measure(
        "coupling, the others' Jacobians in its basis",
        _PAIRS,
        lambda r, k: _blocks(1 - _mean(miscoupling(r, k), 0)),
        of_rank=True,
    ),
    "line_shape_score": _scalar("line-shape score", "line_shape_score"),
    "expodistance": _scalar("expodistance", "expodistance"),
    "equidistance": _scalar("variation of step lengths", "equidistance"),
    "norms": _of_points("norm ‖x‖", "norms", log=True),
    "step_lengths": _of_blocks("step length ‖Δx‖", "step_lengths", log=True),
    "windowed_line_shape": _of_windows("line-shape score, windowed", "windowed_line_shape"),
    "windowed_expodistance": _of_windows("expodistance, windowed", "windowed_expodistance"),
    "entropy": _of_points("entropy of the decoded logits (nats)", "entropy"),
    "effective_rank": _of_blocks("effective rank of the Jacobian", "effective_rank"),
    "participation_ratio": _of_blocks("participation ratio", "participation_ratio"),
}
