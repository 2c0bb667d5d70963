"""Types of facts about a model: the same in plans of sweeps, CSV files and ``facts.json``."""

from __future__ import annotations

import datetime
import math
import re
import unicodedata
from typing import Any

SIZES = ("n_params", "n_layers", "d_model", "n_heads", "vocab_size")
# The facts that `fit` knows; any other name becomes a column of its own.
FACTS = ("family", "tuned", "training_tokens", "released", *SIZES)
NUMBERS = ("training_tokens", "released", "step", *SIZES)
_TRUTHS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0", "0.0"), False),
}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SEPARATED = re.compile(r"[-+]?[0-9]{1,3}(?:[ ,_'][0-9]{3})+(?:\.[0-9]+)?")  # such as 300,000


def typed_fact(name: str, value: Any) -> Any:
    """Return a fact in the type that its name asks for; a date becomes a number of years.

    Args:
        name: one of ``FACTS``, ``step``, ``lineage``, or any other.
        value: the value as it was read, not None.

    Returns:
        A bool, a finite number or a text of one line.

    Raises:
        ValueError: naming what is expected instead.
    """
    if name == "tuned":
        if (truth := to_truth(str(value))) is None:
            raise ValueError("true or false")
        return truth
    if name in ("family", "lineage"):
        if not is_name(value):
            raise ValueError("a text of one line; put numbers in quotes")
        return value.strip()
    value = _in_years(value)
    if name == "released":
        if not (is_number(value) and 1950 <= value <= 2200):
            raise ValueError(
                "a date such as 2023-07-01, or a number of years from 1950 to 2200 such as 2023.5"
            )
    elif name in SIZES:
        if not (is_number(value) and value > 0 and value == int(value)):
            raise ValueError("a positive whole number such as 7e9, without a unit or separators")
    elif name in ("training_tokens", "step"):  # of a checkpoint at step 0 both are 0
        if not (is_number(value) and value >= 0):
            raise ValueError("a number of 0 or more such as 300e9, without a unit or separators")
    elif isinstance(value, str) and _SEPARATED.fullmatch(value.strip()):
        raise ValueError("a number without separators")
    elif not (isinstance(value, bool) or is_number(value) or is_name(value)):
        raise ValueError("a number, a date, true or false, or a text of one line")
    return value


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, which true and false are not."""
    try:
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
        return is_real and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_name(value: Any) -> bool:
    """Return whether a value is a text of one line, not blank, without control characters."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in value)
    )


def to_truth(text: str) -> bool | None:
    """Return the truth value that a text such as "yes", "n" or "TRUE" is, else None."""
    return _TRUTHS.get(text.strip().lower())


def to_date(text: str) -> datetime.date | None:
    """Return the date that a text such as "2023-07-01" is, else None."""
    try:
        return datetime.date.fromisoformat(text) if _DATE.fullmatch(text) else None
    except ValueError:  # the thirtieth of February
        return None


def _in_years(value: Any) -> Any:
    """Return a date as a number that regressions can use: 2023-07-01 is 2023.496."""
    day = to_date(value.strip()) if isinstance(value, str) else value
    if not isinstance(day, datetime.date):
        return value
    first, next_first = datetime.date(day.year, 1, 1), datetime.date(day.year + 1, 1, 1)
    return round(day.year + (day - first).days / (next_first - first).days, 3)
