"""JSON that every parser reads: without NaN and infinity, in place of which stands ``null``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_AS_IT_IS = frozenset((str, int, bool, type(None)))


def strict(
    value: Any, number: Callable[[float], float | int] = float, name: Callable[[Any], Any] = str
) -> Any:
    """Convert to plain dictionaries, lists, texts, numbers and None; other objects become texts.

    Args:
        value: of mappings, sequences, scalars of NumPy and others.
        number: converts finite numbers that are not whole by their type, for instance by rounding.
        name: converts the names of mappings, which are texts in a file.

    Returns:
        A copy in which a number that is not finite is None.
    """
    kind = type(value)
    if kind in _AS_IT_IS:  # first, because nearly all values of a large page are such or numbers
        return value
    if kind is float:
        return number(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name(key): strict(member, number, name) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [strict(member, number, name) for member in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)
