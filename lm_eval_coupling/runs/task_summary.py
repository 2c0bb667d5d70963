"""Summary of a task over its measured documents. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_eval_coupling.measures.formulas.means import mean_and_error, mean_of_parts
from lm_eval_coupling.measures.registry import (
    JACOBIAN,
    Reading,
    SampleReading,
    default_measures,
    prompt_readings,
    registered_measures,
)
from lm_eval_coupling.measuring.record import PromptCoupling

_JACKKNIFE = 20  # groups of documents that are left out in turn


def document_value(prompts: Sequence[PromptCoupling], rank: int) -> float:
    """Return the mean coupling over a document's prompts; NaN if one of them has none."""
    return mean_of_parts(prompt.coupling(rank) for prompt in prompts)


def summarize(
    documents: Mapping[Any, Sequence[PromptCoupling]], ranks: Sequence[int]
) -> dict[str, Any]:
    """Summarize every reading of one task over its documents, for every rank.

    Args:
        documents: the records of each document.
        ranks: numbers K of singular vectors.

    Returns:
        The numbers of ``measured`` and ``failed`` documents: one fails if any of its prompts does.
        ``reasons`` and ``reason_codes`` count prompts. ``measures`` has ``mean, stderr, n`` of
        every reading, by rank if it depends on K.
    """
    prompts = [prompt for group in documents.values() for prompt in group]
    # A document without any prompt was not measured.
    measured = sum(bool(group) and all(map(was_measured, group)) for group in documents.values())
    return {
        "measured": measured,
        "failed": len(documents) - measured,
        "reasons": dict(Counter(prompt.reason for prompt in prompts if prompt.reason)),
        "reason_codes": dict(Counter(code for prompt in prompts for code in prompt.reason_codes)),
        "measures": _measures(documents, ranks),
    }


_PROOF = {column.name for column in JACOBIAN}


def was_measured(prompt: PromptCoupling) -> bool:
    """Return whether a prompt has any number besides the certificates of its Jacobians."""
    return any(not _PROOF.issuperset(result.columns) for result in prompt.results.values())


def _measures(
    documents: Mapping[Any, Sequence[PromptCoupling]], ranks: Sequence[int]
) -> dict[str, Any]:
    requested = {
        name for group in documents.values() for prompt in group for name in prompt.measures
    }
    summaries: dict[str, Any] = {}
    for reading in prompt_readings(requested or default_measures()):
        by_rank = {}
        for rank in ranks if reading.of_rank else ranks[:1]:
            value = _reader(reading, rank)
            by_rank[rank] = mean_and_error(
                mean_of_parts(map(value, group)) for group in documents.values()
            )
        summaries[reading.name] = by_rank if reading.of_rank else by_rank[ranks[0]]
    for name, measure in registered_measures().items():
        for sample_reading in measure.sample_readings if name in requested else ():
            summaries[sample_reading.name] = _over_sample(documents, sample_reading)
    return summaries


def _over_sample(
    documents: Mapping[Any, Sequence[PromptCoupling]], reading: SampleReading
) -> dict[str, float | int]:
    """Read a sample of documents, with the standard error of a grouped jackknife."""
    vectors = []
    for prompts in documents.values():
        columns = [prompt[reading.column] for prompt in prompts]
        if columns and all(column is not None for column in columns):
            vectors.append(np.mean(np.asarray(columns, dtype=np.float64), axis=0))
    n = len(vectors)
    if n < reading.fewest:
        return {"mean": math.nan, "stderr": math.nan, "n": n}
    sample = np.stack(vectors)
    left_out = [
        reading.read(sample[np.arange(n) % _JACKKNIFE != group]) for group in range(_JACKKNIFE)
    ]
    spread = np.var(left_out) * (_JACKKNIFE - 1)
    return {"mean": reading.read(sample), "stderr": math.sqrt(spread), "n": n}


def _reader(reading: Reading, rank: int) -> Callable[[PromptCoupling], float]:
    def value(prompt: PromptCoupling) -> float:
        known = prompt[reading.column]
        is_missing = known is None or (isinstance(known, float) and math.isnan(known))
        return math.nan if is_missing else float(reading.read(prompt, rank))

    return value
