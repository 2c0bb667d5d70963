"""A mean with its standard error; standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable


def mean_and_error(values: Iterable[float]) -> dict[str, float | int]:
    """Return mean, standard error (NaN below two values) and number of the defined values.

    Sums are exact before they are rounded, so that the order of the values does not matter.
    """
    defined = [float(value) for value in values if not math.isnan(value)]
    n = len(defined)
    mean = math.fsum(defined) / n if n else math.nan
    squares = math.fsum((value - mean) ** 2 for value in defined)
    stderr = math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan
    return {"mean": mean, "stderr": stderr, "n": n}


def mean_of_parts(values: Iterable[float]) -> float:
    """Return the mean of the parts of one whole; NaN if there is none or one is undefined.

    The mean over the other parts would be the value of something else.
    """
    parts = [float(value) for value in values]
    return math.fsum(parts) / len(parts) if parts else math.nan
