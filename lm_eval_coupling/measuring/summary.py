"""From measured prompts to the numbers a task is reported with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_eval_coupling.measuring.prompt import PromptCoupling

PAIR_MEASURES = (
    "normalized_miscoupling",
    "miscoupling",
    "miscoupling_to",
    "miscoupling_to_absolute",
    "miscoupling_to_trace",
    "miscoupling_to_vju",
    "miscoupling_to_absolute_vju",
)


def headline_rank(ranks: Sequence[int]) -> int:
    """The K of the metric ``coupling``: 10 whenever it was measured, else the smallest. Never mixed with another K."""
    return 10 if 10 in ranks else min(ranks)


def mean_and_error(values: Iterable[float]) -> dict[str, float | int]:
    """Mean, standard error (``NaN`` below two values) and number of the values that are defined."""
    known = np.array([v for v in values if not math.isnan(v)], dtype=np.float64)
    mean = float(known.mean()) if len(known) else math.nan
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
    return {"mean": mean, "stderr": error, "n": len(known)}


def document_value(prompts: Sequence[PromptCoupling], rank: int) -> float:
    """A document's coupling: the mean over its measured prompts; NaN if there is none."""
    return mean_and_error(prompt.coupling(rank) for prompt in prompts)["mean"]


def summarize(documents: Mapping[Any, Sequence[PromptCoupling]], ranks: Sequence[int]) -> dict[str, Any]:
    """Every measure of one task over its documents, for every rank, with what could not be measured and why.

    Args:
        documents: the measured prompts of each document.
        ranks: numbers K of singular vectors.
    """
    prompts = [prompt for group in documents.values() for prompt in group]
    reasons = Counter(prompt.reason for prompt in prompts if prompt.reason)
    measured = sum(any(_was_measured(p) for p in group) for group in documents.values())
    return {
        "measured": measured,
        "failed": len(documents) - measured,
        "reasons": dict(reasons),
        "measures": _measures(documents, ranks),
    }


def _was_measured(prompt: PromptCoupling) -> bool:
    return prompt.normalized_miscoupling is not None or not math.isnan(prompt.line_shape_score)


def _measures(documents: Mapping[Any, Sequence[PromptCoupling]], ranks: Sequence[int]) -> dict[str, Any]:
    def over_documents(value) -> dict[str, float | int]:
        return mean_and_error(mean_and_error(map(value, group))["mean"] for group in documents.values())

    measures: dict[str, Any] = {"coupling": {}, "coupling_with_diagonal": {}} | {name: {} for name in PAIR_MEASURES}
    for i, k in enumerate(ranks):
        measures["coupling"][k] = over_documents(lambda p, k=k: p.coupling(k))
        measures["coupling_with_diagonal"][k] = over_documents(lambda p, k=k: p.coupling(k, diagonal=True))
        for name in PAIR_MEASURES:
            measures[name][k] = over_documents(lambda p, name=name, i=i: _mean_off_diagonal(getattr(p, name), i))
    measures["line_shape_score"] = over_documents(lambda p: p.line_shape_score)
    measures["expodistance"] = over_documents(lambda p: p.expodistance)
    return measures


def _mean_off_diagonal(pairs: np.ndarray | None, index: int) -> float:
    if pairs is None:
        return math.nan
    matrix = pairs[index]
    known = matrix[~np.eye(len(matrix), dtype=bool) & ~np.isnan(matrix)]
    return float(known.mean()) if known.size else math.nan
