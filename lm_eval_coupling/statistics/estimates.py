"""Results of statistics as rows of a table, and the selection of complete observations."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import pandas as pd

from lm_eval_coupling.errors import CouplingError

CONFIDENCE = 0.95  # level of the intervals, and of what counts as beyond chance
Values: TypeAlias = np.ndarray | pd.Series | Sequence[float | int | bool]


_R = TypeVar("_R", bound="Result")


class Result:
    """Base of the frozen dataclasses of numbers that flatten into one row of a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return one row of a table.

        An estimate ``slope`` becomes ``slope, slope_stderr, slope_low, slope_high``. Arrays are
        left out.
        """
        row: dict[str, Any] = {}
        for field in dataclasses.fields(cast(Any, self)):  # every subclass is a dataclass
            if field.repr:
                row |= _cells(field.name, getattr(self, field.name))
        return row

    def with_reason(self: _R, reason: str | None) -> _R:
        """Return a copy with the reason why it has no further numbers."""
        return dataclasses.replace(cast(Any, self), reason=reason)


@dataclasses.dataclass(frozen=True)
class Estimate(Result):
    """A number with its standard error and confidence interval."""

    value: float = math.nan
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def from_t(
        cls, value: float, stderr: float, df: float | int, confidence: float = CONFIDENCE
    ) -> Estimate:
        """Return the estimate with Student's interval; ``df=math.inf`` is the normal one."""
        if math.isnan(stderr):
            return cls(float(value))
        # Imported here: most tables need no quantile. `scipy.stats` would take ten times as long.
        from scipy import special

        level = (1 + confidence) / 2
        quantile = special.ndtri(level) if math.isinf(df) else special.stdtrit(df, level)
        half = quantile * stderr
        return cls(float(value), float(stderr), float(value - half), float(value + half))


def _cells(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Estimate):
        parts = ("stderr", "low", "high")
        return {name: value.value} | {f"{name}_{part}": getattr(value, part) for part in parts}
    if isinstance(value, Result):
        return {f"{name}_{key}": cell for key, cell in value.to_dict().items()}
    if isinstance(value, Mapping):
        rows = [_cells(part, inner) for part, inner in value.items()]
        return {key: cell for row in rows for key, cell in row.items()}
    return {name: "; ".join(value) if isinstance(value, tuple) else value}


def as_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Return a table with one row per result."""
    return pd.DataFrame([result.to_dict() for result in results])


def complete(**columns: Values | None) -> tuple[dict[str, np.ndarray], int]:
    """Select the observations that every column has; a column of None is ignored.

    Returns:
        Float64 arrays by name, all of one length, and the number of dropped observations.

    Raises:
        CouplingError: If columns differ in length or one is not numeric.
    """
    arrays = {
        name: _numbers(name, values) for name, values in columns.items() if values is not None
    }
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise CouplingError(
            f"got columns of lengths {lengths}, expected one value per observation in each"
        )
    is_complete = np.logical_and.reduce([np.isfinite(values) for values in arrays.values()])
    return {name: values[is_complete] for name, values in arrays.items()}, int((~is_complete).sum())


def complete_rows(
    frame: pd.DataFrame, numeric: Sequence[str], labels: Sequence[str] = ()
) -> tuple[pd.DataFrame, int]:
    """Select the rows in which all named columns are known, with numbers as float64.

    Returns:
        The rows, numbered from 0, and the number of dropped rows.

    Raises:
        CouplingError: If a column is missing, named twice or not numeric.
    """
    names = [*numeric, *labels]
    if missing := [name for name in names if name not in frame.columns]:
        present = ", ".join(map(str, frame.columns))
        raise CouplingError(f"got no column {missing[0]!r}, expected one of: {present}")
    if len(set(names)) < len(names):
        raise CouplingError(f"got the columns {', '.join(names)}, expected each of them once")
    columns = {name: _numbers(name, frame[name]) for name in numeric}
    is_complete = np.ones(len(frame), dtype=bool)
    for values in columns.values():
        is_complete &= np.isfinite(values)
    columns |= {name: frame[name].to_numpy() for name in labels}
    for name in labels:
        is_complete &= ~pd.isna(columns[name])
    kept = pd.DataFrame({name: values[is_complete] for name, values in columns.items()})
    return kept, int((~is_complete).sum())


def _numbers(name: str, values: Values) -> np.ndarray:
    # pandas 2 would hand its own missing value to NumPy, which has no number for it.
    if isinstance(values, pd.Series) and isinstance(values.dtype, pd.api.extensions.ExtensionDtype):
        values = values.to_numpy(na_value=np.nan)
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise CouplingError(
            f"got {name} that is not numeric, expected one number per observation"
        ) from None
    if numbers.ndim != 1:
        raise CouplingError(
            f"got {name} of shape {numbers.shape}, expected one number per observation"
        )
    return numbers


def design(rows: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return the design matrix of these columns less their means, the constant first.

    Beside a large mean, their differences would be lost to rounding.
    """
    columns = rows[[*names]]
    return np.column_stack([np.ones(len(rows)), columns - columns.mean()])


def is_constant(values: np.ndarray) -> bool:
    """Return whether the values differ by no more than their rounding."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def load_statsmodels(module: str) -> Any:
    """Return ``statsmodels.<module>``, or raise CouplingError if it is not installed."""
    try:
        return importlib.import_module(f"statsmodels.{module}")
    except ImportError:
        raise CouplingError(
            "got no statsmodels, which regressions need: pip install 'lm-eval-coupling[analysis]'"
        ) from None
