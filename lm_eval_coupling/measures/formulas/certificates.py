"""Rule which certificates count: those of Jacobians that gave a number. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from lm_eval_coupling.measures.registry import JACOBIAN, Column, Record, registered_measures


def columns_from_jacobians() -> Iterator[list[Column]]:
    """Yield the columns of each measure that records certificates, without those of ``JACOBIAN``.

    A measure fills all of them, or none if the Jacobians were refused.
    """
    for measure in registered_measures().values():
        columns = [column for column in measure.columns if column not in JACOBIAN]
        if len(columns) < len(measure.columns):
            yield columns


def counted_certificate(record: Record, numbers: Iterable[str]) -> float:
    """Return the largest certificate of a record whose Jacobians gave a number.

    Args:
        record: with ``certificate`` and these columns.
        numbers: columns of :func:`columns_from_jacobians`; at least one of each measure.

    Returns:
        NaN if none of ``numbers`` is there: refused Jacobians leave only their certificates.
    """
    if record["certificate"] is None or all(record[name] is None for name in numbers):
        return math.nan
    return float(np.max(record["certificate"]))


def largest_certificate(certificates: Iterable[float]) -> float:
    """Return the largest of several :func:`counted_certificate`; NaN if none is counted."""
    return max((c for c in certificates if not math.isnan(c)), default=math.nan)
