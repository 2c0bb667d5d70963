"""What all results have in common, and which observations a statistic is taken over."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError

Values: TypeAlias = np.ndarray | pd.Series | Sequence[float | int | bool]


class Result:
    """A frozen dataclass of numbers that flattens into one row of a table."""

    def to_dict(self) -> dict[str, Any]:
        """One row: an estimate ``slope`` becomes ``slope, slope_stderr, slope_low, slope_high``; arrays are left out."""
        row: dict[str, Any] = {}
        for field in dataclasses.fields(cast(Any, self)):  # every kind of result is a dataclass
            if field.repr:
                row |= _cells(field.name, getattr(self, field.name))
        return row


@dataclasses.dataclass(frozen=True)
class Estimate(Result):
    """A number with its standard error and confidence interval."""

    value: float = math.nan
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def from_t(cls, value: float, stderr: float, df: float | int, confidence: float) -> Estimate:
        """The interval of Student's t with ``df`` degrees of freedom (``math.inf``: of the normal distribution)."""
        half = stats.t.ppf((1 + confidence) / 2, df) * stderr
        return cls(float(value), float(stderr), float(value - half), float(value + half))


def _cells(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Estimate):
        return {name: value.value} | {
            f"{name}_{part}": getattr(value, part) for part in ("stderr", "low", "high")
        }
    if isinstance(value, Result):
        return {f"{name}_{key}": cell for key, cell in value.to_dict().items()}
    if isinstance(value, Mapping):
        return {
            key: cell for part, inner in value.items() for key, cell in _cells(part, inner).items()
        }
    return {name: "; ".join(value) if isinstance(value, tuple) else value}


def as_frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per result."""
    return pd.DataFrame([result.to_dict() for result in results])


def complete(**columns: Values | None) -> tuple[dict[str, np.ndarray], int]:
    """The observations that every column has, as float64, and how many were dropped; a column of None stays out.

    Returns:
        Arrays by name, all of one length, and the number of observations without one of them.

    Raises:
        CouplingError: if columns differ in length or one is not numeric.
    """
    arrays = {
        name: _numbers(name, values) for name, values in columns.items() if values is not None
    }
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise CouplingError(
            f"got columns of lengths {lengths}, expected one value per observation in each"
        )
    known = np.logical_and.reduce([np.isfinite(values) for values in arrays.values()])
    return {name: values[known] for name, values in arrays.items()}, int((~known).sum())


def complete_rows(
    frame: pd.DataFrame, numeric: Sequence[str], labels: Sequence[str] = ()
) -> tuple[pd.DataFrame, int]:
    """The named columns where all of them are known, numbers as float64, and how many rows were dropped.

    Returns:
        The rows, numbered from 0, and the number of those that lack one of the columns.

    Raises:
        CouplingError: if a column is missing, named twice or not numeric.
    """
    names = [*numeric, *labels]
    if missing := [name for name in names if name not in frame.columns]:
        raise CouplingError(
            f"got no column {missing[0]!r}, expected one of: {', '.join(map(str, frame.columns))}"
        )
    if len(set(names)) < len(names):
        raise CouplingError(f"got the columns {', '.join(names)}, expected each of them once")
    rows = pd.DataFrame({name: _numbers(name, frame[name]) for name in numeric}).replace(
        [np.inf, -np.inf], np.nan
    )
    for name in labels:
        rows[name] = frame[name].to_numpy()
    kept = rows.dropna().reset_index(drop=True)
    return kept, len(rows) - len(kept)


def _numbers(name: str, values: Values) -> np.ndarray:
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


def constant(values: np.ndarray) -> bool:
    """Whether values differ by no more than their rounding."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def check_confidence(confidence: float) -> None:
    """Raise CouplingError unless ``0 < confidence < 1``."""
    if not 0 < confidence < 1:
        raise CouplingError(
            f"got confidence={confidence}, expected a number between 0 and 1 such as 0.95"
        )


def statsmodels(module: str) -> Any:
    """``statsmodels.<module>``, or a CouplingError that says how to install it."""
    try:
        return importlib.import_module(f"statsmodels.{module}")
    except ImportError:
        raise CouplingError(
            "got no statsmodels, which regressions need: pip install 'lm-eval-coupling[analysis]'"
        ) from None
