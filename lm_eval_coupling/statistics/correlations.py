"""Correlations with intervals and permutation tests, plain, partial and within groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Result,
    Values,
    complete,
    complete_rows,
    design,
    is_constant,
)
from lm_eval_coupling.statistics.resampling import (
    FEW,
    Families,
    Orders,
    Units,
    correlation_interval,
    orders_within,
    permutation_p_value,
    without_each,
)

MANY = 200  # observations; above it large-sample theory agrees with resampling, and is faster

Method = Literal["pearson", "spearman", "kendall"]


@dataclasses.dataclass(frozen=True)
class Correlation(Result):
    """A correlation coefficient with its interval.

    ``given`` counts the variables that were held fixed. ``families`` counts the families that
    were permuted and left out as wholes; it is 0 where models were taken as independent.
    """

    method: str
    coefficient: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    n: int = 0
    dropped: int = 0
    given: int = 0
    confidence: float = CONFIDENCE
    reason: str | None = None
    families: int = 0


def correlation(
    x: Values,
    y: Values,
    *,
    method: Method = "pearson",
    family: Families | None = None,
    resamples: int = 4999,
    seed: int = 0,
) -> Correlation:
    """Correlate x and y, with a two-sided permutation test.

    The test is exact where all permutations number at most ``resamples``. With ``family``,
    families are permuted and left out as wholes. The interval is the jackknife's on Fisher's
    scale, or Fisher's where that is wider; Spearman's and Kendall's (tau-b) use the variances of
    Bonett and Wright (2000), from 8 pairs on. Above 200 pairs without families the test is
    scipy's and the interval of ranks is the large-sample one.

    Args:
        x: One number per observation; pairs with a missing number are dropped and counted.
        y: As many numbers.
        method: ``pearson``, ``spearman`` or ``kendall``.
        family: Family of each observation, if models come in families.
        resamples: Number of permutations.
        seed: Seed of the permutations.

    Returns:
        The coefficient with its interval and p, or the ``reason`` why there is none.

    Raises:
        CouplingError: If x and y differ in length or are not numeric, or the method is unknown.
    """
    if method not in _COEFFICIENTS:
        raise CouplingError(f"got method={method!r}, expected one of {', '.join(_COEFFICIENTS)}")
    codes = None if family is None else pd.factorize(pd.Series(list(family)).astype(str))[0]
    columns, dropped = complete(x=x, y=y, family=codes)
    x, y = columns["x"], columns["y"]
    n, units = len(x), Units.of(columns.get("family"), len(x))
    result = Correlation(method, n=n, dropped=dropped, families=units.families)
    if reason := undefined({"x": x, "y": y}):
        return result.with_reason(reason)
    coefficient_of = _COEFFICIENTS[method]
    coefficient = float(coefficient_of(x, y))
    if n > MANY and not units.families:
        p = float(_LARGE_SAMPLE_TESTS[method](x, y).pvalue)
    else:
        orders = units.permutations(resamples, np.random.default_rng(seed))
        permuted = _permuted(x, y, method, orders.places)
        p = permutation_p_value(coefficient, permuted, orders.are_all)
    result = dataclasses.replace(result, coefficient=coefficient, p=p)
    if reason := _why_no_interval(coefficient, units, n, method):
        return result.with_reason(reason)
    # Leaving out each of many ranked pairs costs a sort each, and changes little.
    plain = not units.families and n > MANY and method != "pearson"
    without = np.array([]) if plain else _without_each_unit(x, y, method, units)
    variance = 0.0 if units.families else _fisher_variance(method, coefficient, n)
    low, high = correlation_interval(coefficient, without, variance)
    return dataclasses.replace(result, low=low, high=high)


def partial_correlation(
    frame: pd.DataFrame,
    x: str,
    y: str,
    given: Sequence[str],
    *,
    family: str | None = None,
    resamples: int = 4999,
    seed: int = 0,
) -> Correlation:
    """Correlate (Pearson) two columns of a table with the columns ``given`` held fixed.

    The test permutes the residuals of y (Freedman and Lane 1983), families as wholes. The
    interval is that of :func:`correlation`.

    Returns:
        The correlation of what is left of x and y, or the ``reason`` why there is none.

    Raises:
        CouplingError: If a column is missing or not numeric.
    """
    rows, dropped = complete_rows(frame, [x, y, *given], [family] if family else [])
    fixed = design(rows, given)
    units = Units.of(rows[family] if family else None, len(rows))
    result = Correlation(
        "partial pearson",
        n=len(rows),
        dropped=dropped,
        given=_rank(fixed) - 1,
        families=units.families,
    )
    orders = units.permutations(resamples, np.random.default_rng(seed))
    return _correlate_residuals(
        rows[x].to_numpy(), rows[y].to_numpy(), fixed, units, orders, result
    )


def correlation_within(
    frame: pd.DataFrame,
    x: str,
    y: str,
    group: str,
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    resamples: int = 4999,
    seed: int = 0,
) -> Correlation:
    """Correlate two columns of a table within groups, each of which has its own level.

    Spearman's ranks are taken within each group and scaled to [0, 1]. Groups of one are dropped
    and counted. Up to 200 observations the test permutes within groups; above, it is Student's t
    with one degree of freedom less for every group. Spearman's interval needs 8 pairs, and one
    more for each further group. It says something of these groups, not of others.

    Returns:
        The coefficient with its interval and p, or the ``reason`` why there is none.

    Raises:
        CouplingError: If a column is missing or not numeric, or the method is unknown.
    """
    if method not in ("pearson", "spearman"):
        raise CouplingError(f"got method={method!r}, expected 'pearson' or 'spearman'")
    rows, dropped = complete_rows(frame, [x, y], [group])
    alone = ~rows[group].duplicated(keep=False)
    rows, dropped = rows[~alone].reset_index(drop=True), dropped + int(alone.sum())
    values = rows[[x, y]]
    if method == "spearman":
        sizes = rows.groupby(group)[x].transform("size")
        values = rows.groupby(group)[[x, y]].rank().sub(1).div(sizes - 1, axis=0)
    levels = pd.get_dummies(rows[group], dtype=float).to_numpy()
    result = Correlation(
        f"{method} within groups", n=len(rows), dropped=dropped, given=_rank(levels) - 1
    )
    orders = None
    if len(rows) <= MANY:
        orders = orders_within(rows[group], resamples, np.random.default_rng(seed))
    units = Units.of(None, len(rows))
    return _correlate_residuals(
        values[x].to_numpy(), values[y].to_numpy(), levels, units, orders, result
    )


def undefined(columns: dict[str, np.ndarray], least: int = 3) -> str | None:
    """Return the reason why these columns have no correlation, or None."""
    n = len(next(iter(columns.values())))
    if n < least:
        return f"{n} complete observations, at least {least} are needed"
    return next(
        (f"{name} is constant" for name, values in columns.items() if is_constant(values)), None
    )


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's coefficient along the last axis; 0 where a column does not vary."""
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    return _cosine(x, y)


def pearson_without_each(x: np.ndarray, y: np.ndarray, units: Units) -> Float[np.ndarray, " unit"]:
    """Return Pearson's coefficient with each unit left out, 0 where x or y no longer varies.

    A unit is a group of observations, such as a family of models. The sums of each unit are
    subtracted from the totals.
    """
    x, y = x - x.mean(), y - y.mean()
    products = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y])
    sums = np.stack([np.bincount(units.codes, p, units.number) for p in products])
    n, sx, sy, sxy, sxx, syy = sums.sum(axis=1, keepdims=True) - sums
    n = np.maximum(n, 1)
    covariance = sxy - sx * sy / n
    norm = np.sqrt(np.maximum(sxx - sx**2 / n, 0) * np.maximum(syy - sy**2 / n, 0))
    tolerance = 1e-12 * math.sqrt(float(sxx.max() * syy.max()))  # below it, a norm is rounding
    return _ratio(covariance, norm, tolerance)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _ratio((x * y).sum(axis=-1), np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)))


def _ratio(value: Any, norm: Any, least: float = 0.0) -> np.ndarray:
    """Return value / norm, or 0 where the norm is no more than ``least``."""
    value, norm = np.asarray(value), np.asarray(norm)
    return np.divide(value, norm, out=np.zeros_like(norm), where=norm > least)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))


def _kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return tau-b: the cosine between the signs of all differences."""
    i, j = np.triu_indices(x.shape[-1], 1)
    return _cosine(*(np.sign(v[..., i] - v[..., j]) for v in (x, y)))


_COEFFICIENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pearson": pearson,
    "spearman": _spearman,
    "kendall": _kendall,
}
_LARGE_SAMPLE_TESTS = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}


def _permuted(x: np.ndarray, y: np.ndarray, method: Method, orders: np.ndarray) -> np.ndarray:
    """Return the coefficient of every permutation of x with y."""
    if method == "spearman":  # ranked once, as ranks permute with x
        x, y = stats.rankdata(x), stats.rankdata(y)
    if method != "kendall":
        x, y = x - x.mean(), y - y.mean()
        return (x[orders] @ y) / math.sqrt((x @ x) * (y @ y))
    signs_x, signs_y = (np.sign(v[:, None] - v).astype(np.float32) for v in (x, y))
    norm = math.sqrt(float(np.sum(signs_x**2)) * float(np.sum(signs_y**2)))
    at_once = max(1, 4_000_000 // len(x) ** 2)
    sums = [
        np.einsum("bij,ij->b", signs_x[o[:, :, None], o[:, None, :]], signs_y)
        for o in np.array_split(orders, math.ceil(len(orders) / at_once))
    ]
    return np.concatenate(sums).astype(np.float64) / norm


def _without_each_unit(
    x: np.ndarray, y: np.ndarray, method: Method, units: Units
) -> Float[np.ndarray, " unit"]:
    """Return the coefficient with each unit (a model or family) left out."""
    if method == "pearson":
        return pearson_without_each(x, y, units)
    kept = units.left_out().astype(float)
    if method == "kendall":
        signs = [np.sign(v[:, None] - v) for v in (x, y)]
        products = (signs[0] * signs[1], signs[0] ** 2, signs[1] ** 2)
        both, of_x, of_y = (
            np.einsum("ui,ij,uj->u", kept, p, kept, optimize=True) for p in products
        )
        return _ratio(both, np.sqrt(of_x * of_y))
    # Leaving out an observation lowers the ranks of those above it by 1, of its ties by 1/2.
    ranks = [
        stats.rankdata(v) - (1 - kept) @ ((v[:, None] < v) + 0.5 * (v[:, None] == v))
        for v in (x, y)
    ]
    counts = kept.sum(axis=1, keepdims=True)
    centered = [kept * (r - (kept * r).sum(axis=1, keepdims=True) / counts) for r in ranks]
    return _cosine(*centered)


def _fisher_variance(method: str, r: float, n: int) -> float:
    """Return the large-sample variance of artanh r."""
    if method == "kendall":
        return 0.437 / (n - 4) if n > 4 else math.inf
    factor = 1 + r**2 / 2 if method == "spearman" else 1.0
    return factor / (n - 3) if n > 3 else math.inf


def _why_no_interval(
    coefficient: float, units: Units, n: int, method: Method, given: int = 0
) -> str | None:
    """Return why a coefficient of ``n`` observations has no interval, or None if it has one.

    Pearson's always has one where observations are independent (``units.families`` is 0). Each
    number that is held fixed (``given``), as the level of a further group, takes one pair more.
    """
    if 0 < units.families < 3:
        return f"no interval from {units.families} families"
    if method == "pearson" and not units.families:
        return None
    if n - given < FEW and not units.families:
        groups = f" in {given + 1} groups" if given else ""
        return f"no interval from {n} pairs{groups}, a rank correlation needs {FEW + given}"
    if abs(coefficient) > 1 - 1e-12:
        return "no interval, as the correlation is perfect"
    return None


def _rank(fixed: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(fixed)) if len(fixed) else 1


def _correlate_residuals(
    x: np.ndarray,
    y: np.ndarray,
    fixed: np.ndarray,
    units: Units,
    orders: Orders | None,
    result: Correlation,
) -> Correlation:
    """Correlate the residuals of x and y after a regression on the columns of ``fixed``.

    The constant must be a combination of these columns.

    Returns:
        The result with its numbers. Without ``orders`` of the residuals its test is Student's t.
    """
    df = len(x) - 2 - result.given
    if df < 1:
        return result.with_reason(
            f"{len(x)} observations with {result.given} numbers held fixed are too few"
        )
    basis = np.linalg.svd(fixed, full_matrices=False)[0][:, : result.given + 1]
    rx, ry = (v - basis @ (basis.T @ v) for v in (x, y))
    for name, v, residual in (("x", x, rx), ("y", y, ry)):
        if np.linalg.norm(residual) <= 1e-10 * np.linalg.norm(v):
            return result.with_reason(f"{name} is constant once the others are held fixed")
    r = float(_cosine(rx, ry))
    if orders is None:
        with np.errstate(divide="ignore"):
            t = r * np.sqrt(df / np.maximum(1 - r**2, 0.0))
        p = float(2 * stats.t.sf(abs(t), df))
    else:
        permuted = ry[orders.places]
        permuted -= (permuted @ basis) @ basis.T
        p = permutation_p_value(r, _cosine(permuted, rx), orders.are_all)
    result = dataclasses.replace(result, coefficient=r, p=p)
    method: Method = "spearman" if result.method.startswith("spearman") else "pearson"
    if reason := _why_no_interval(r, units, len(x), method, result.given):
        return result.with_reason(reason)
    without = np.array([])
    if orders is not None:
        without = without_each(_partial, (x, y, fixed), units)
        without = without[np.isfinite(without)]
    if units.families and len(without) < 3:
        return result.with_reason(
            f"no interval, as a correlation remains without {len(without)} families only"
        )
    variance = 0.0 if units.families else _fisher_variance(method, r, df + 2)
    low, high = correlation_interval(r, without, variance)
    return dataclasses.replace(result, low=low, high=high)


def _partial(x: np.ndarray, y: np.ndarray, fixed: np.ndarray) -> float:
    """Return the correlation of the residuals; NaN where the rest fixes one of them."""
    residuals = [v - fixed @ np.linalg.lstsq(fixed, v, rcond=None)[0] for v in (x, y)]
    if any(
        np.linalg.norm(r) <= 1e-10 * np.linalg.norm(v)
        for r, v in zip(residuals, (x, y), strict=True)
    ):
        return math.nan
    return float(_cosine(*residuals))
