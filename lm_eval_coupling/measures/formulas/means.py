"""A mean with its standard error. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def mean_and_error(values: Iterable[float]) -> dict[str, float | int]:
    """Mean, standard error (``NaN`` below two values) and number of the values that are defined."""
    known = np.array([v for v in values if not math.isnan(v)], dtype=np.float64)
    mean = float(known.mean()) if len(known) else math.nan
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
    return {"mean": mean, "stderr": error, "n": len(known)}
