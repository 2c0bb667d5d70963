"""What every parser of JSON reads: it has no NaN and no infinity, so that what is not known is ``null``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def strict(
    value: Any, number: Callable[[float], float | int] = float, name: Callable[[Any], Any] = str
) -> Any:
    """Plain dictionaries, lists, texts, numbers and None; what is none of these, such as a path, becomes a text.

    Args:
        value: of mappings, sequences, scalars of numpy's and others.
        number: what a finite number that is not whole by its type is written as, such as one of fewer digits.
        name: what the names of mappings are written as: texts, as they are in a file.

    Returns:
        A copy in which a number that is not finite is None.
    """
    if isinstance(value, Mapping):
        return {name(key): strict(member, number, name) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [strict(member, number, name) for member in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)
