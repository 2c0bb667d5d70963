"""Means over several tasks that compare: every model's mean is over the same tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True)
class SharedMeans:
    """Means of units (models) over the same items (tasks) for all of them.

    Attributes:
        means: by unit, a column per averaged column of the input and ``n``, the number of items.
            Empty where no two items are shared.
        items: the items that every mean is over.
        incomplete_items: items that were left out, each with the units that have no value of it.
        incomplete_units: units that were left out, each with the items that it has no value of.
    """

    means: pd.DataFrame
    items: tuple[str, ...]
    incomplete_items: Mapping[str, tuple[str, ...]]
    incomplete_units: Mapping[str, tuple[str, ...]]


def mean_over_shared_items(
    rows: pd.DataFrame,
    *,
    unit: str,
    item: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    errors: Sequence[str] = (),
) -> SharedMeans:
    """Average columns over the items that all units have, at least two.

    A unit has an item if there is a row with a finite value in every ``required`` column: a name
    without a value counts as missing. Where fewer than two items are shared by all units, units
    without all items are left out instead, as long as more than half of the units remain.

    Args:
        rows: at most one row per unit and item.
        unit: column that names the unit, such as ``label``.
        item: column that names the item, such as ``score_of``.
        required: columns to average, which decide whether a unit has an item.
        optional: further columns to average; a mean is NaN if one of its items has no value.
        errors: standard errors of independent items; the error of the mean is NaN if one is.

    Returns:
        The means, the items that they are over, and which items or units were left out.

    Raises:
        ValueError: if a unit has an item twice.
    """
    if rows.duplicated([unit, item]).any():
        raise ValueError(f"got several rows of one {unit} and {item}, expected one")
    order = {name: list(dict.fromkeys(rows[name])) for name in (unit, item)}
    has = np.isfinite(rows[[*required]].to_numpy(dtype=float)).all(axis=1)
    there = pd.crosstab(rows[unit].where(has), rows[item].where(has)).astype(bool)
    there = there.reindex(index=order[unit], columns=order[item], fill_value=False)
    items, units = list(there.columns[there.all(axis=0)]), list(there.index)
    if len(items) < 2:
        complete = list(there.index[there.all(axis=1)])
        if len(order[item]) > 1 and 2 * len(complete) > len(units):
            items, units = order[item], complete
        else:
            items, units = items, []
    kept = rows[rows[unit].isin(units) & rows[item].isin(items)]
    groups = kept.groupby(unit, sort=False)
    columns = {name: groups[name].agg(_mean) for name in (*required, *optional)}
    columns |= {name: groups[name].agg(_error_of_mean) for name in errors}
    means = pd.DataFrame(columns | {"n": groups.size()}).reindex(units)
    return SharedMeans(
        means,
        tuple(items),
        {name: tuple(there.index[~there[name]]) for name in order[item] if name not in items},
        {
            name: tuple(there.columns[~there.loc[name]])
            for name in order[unit]
            if units and name not in units
        },
    )


def _mean(values: pd.Series) -> float:
    """Return the mean; NaN if one is missing (pandas 2 has no such mean of groups)."""
    return float(values.mean(skipna=False))


def _error_of_mean(errors: pd.Series) -> float:
    return float(np.sqrt((errors**2).sum(skipna=False)) / len(errors))
