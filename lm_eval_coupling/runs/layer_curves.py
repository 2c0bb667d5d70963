"""Curves over the layers of a run: means over documents of what has a value per layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm_eval_coupling.measures.formulas.means import mean_and_error, mean_of_parts
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.runs.rows import DocumentKey, Row


def layer_curves(rows: Iterable[Row], rank: int) -> list[dict[str, Any]]:
    """Average every reading over depth, at the first of the measured tokens.

    A document's value is the mean over its prompts, undefined where it is in one of them.

    Args:
        rows: of a run.
        rank: number K of singular vectors.

    Returns:
        One row per task, weights, reading and depth: ``task, weights, measure, depth`` (0 before
        the first block, l at block l or its output), ``mean, stderr`` and the number of documents
        ``n``. Depths without a defined value have none.
    """
    curves: dict[tuple[str, str, str, float], dict[DocumentKey, list[float]]] = {}
    in_depth = [reading for reading in readings().values() if reading.over != "prompt"]
    for row in rows:
        for reading in in_depth if row.place == 0 else ():
            if row.measured[reading.column] is None:
                continue
            depths, values = reading.in_depth(row.measured, rank)
            for depth, value in zip(depths.tolist(), values.tolist(), strict=True):
                key = (row.document.task, row.weights, reading.name, depth)
                curves.setdefault(key, {}).setdefault(row.document, []).append(value)
    table = []
    for (task, weights, measure, depth), documents in curves.items():
        mean = mean_and_error(map(mean_of_parts, documents.values()))
        if mean["n"]:
            about = {"task": task, "weights": weights, "measure": measure, "depth": depth}
            table.append(about | mean)
    return table
