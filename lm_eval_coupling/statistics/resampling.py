"""Permutations that keep families together, and intervals from leaving out each family.

Models of one family resemble each other, so a permutation of single models finds too much.
Here families of one size change places as wholes, and models change places within a family:
the test is exact where families, and models within them, are exchangeable. Intervals come from
leaving out each family in turn (jackknife), with Student's t for the small number of families.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats

from lm_eval_coupling.statistics.estimates import CONFIDENCE

Families: TypeAlias = Sequence[object] | pd.Series | np.ndarray

FEW = 8  # models; from fewer no conclusion is drawn
FEW_FAMILIES = 5  # families, where models come in families
_EQUAL = 1e-9  # statistics that differ by less are tied


class Orders(NamedTuple):
    """Orders of the observations, one a row; ``are_all`` tells whether these are all there are."""

    places: Int[np.ndarray, "resample observation"]
    are_all: bool = False


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of resampling: families where several models share one, else single models.

    ``codes`` numbers the unit of each observation; ``families`` counts them, or is 0 where every
    observation is a unit of its own.
    """

    codes: Int[np.ndarray, " observation"]
    families: int

    @classmethod
    def of(cls, families: Families | None, observations: int) -> Units:
        """Return the units of these observations.

        One family for all, or one for each, says nothing of which models resemble each other:
        the observations are units then.
        """
        if families is not None:
            codes, labels = pd.factorize(pd.Series(list(families)).astype(str))
            if 1 < len(labels) < observations:
                return cls(codes, len(labels))
        return cls(np.arange(observations), 0)

    @property
    def number(self) -> int:
        """Number of units."""
        return self.families or len(self.codes)

    def left_out(self) -> Bool[np.ndarray, "unit observation"]:
        """Return one mask per unit, of the observations that remain without it."""
        return np.arange(self.number)[:, None] != self.codes

    def permutations(self, resamples: int, rng: np.random.Generator) -> Orders:
        """Draw orders of the observations that keep families together.

        Families of one size exchange their places, and members exchange theirs within a family.

        Returns:
            ``resamples`` orders; or all orders, the given one first, where there are no families
            and all are no more than that.
        """
        n = len(self.codes)
        if not self.families and math.factorial(min(n, 20)) <= resamples:
            return Orders(np.array(list(itertools.permutations(range(n)))), are_all=True)
        orders = np.empty((resamples, n), dtype=np.intp)
        sizes = np.bincount(self.codes)
        for size in np.unique(sizes):
            members = np.array(
                [np.flatnonzero(self.codes == c) for c in np.where(sizes == size)[0]]
            )
            places = rng.random((resamples, len(members))).argsort(axis=1)
            drawn = members[places]
            within = rng.random(drawn.shape).argsort(axis=-1)
            orders[:, members] = np.take_along_axis(drawn, within, axis=-1)
        return Orders(orders)


def orders_within(groups: pd.Series, resamples: int, rng: np.random.Generator) -> Orders:
    """Draw orders of the observations that move each only within its group."""
    codes = pd.factorize(groups)[0]
    places = np.argsort(codes, kind="stable")
    orders = np.empty((resamples, len(codes)), dtype=np.intp)
    # Sorting random numbers by group shuffles all groups at once.
    orders[:, places] = np.lexsort((rng.random(orders.shape), np.broadcast_to(codes, orders.shape)))
    return Orders(orders)


def permutation_p_value(
    observed: float, resampled: Float[np.ndarray, " resample"], are_all: bool = False
) -> float:
    """Return the share of permutations whose statistic is at least as large in absolute value.

    It is two-sided, and 1 for a statistic of 0.

    Args:
        observed: Statistic of the data.
        resampled: The statistic of each permutation.
        are_all: Whether these are all permutations, the observed one among them.
    """
    larger = int(np.sum(np.abs(resampled) >= abs(observed) - _EQUAL))
    added = 0 if are_all else 1  # the observed order is one more
    return (added + larger) / (added + len(resampled))


def jackknife_error(without: Float[np.ndarray, " unit"], value: float) -> float:
    """Return the standard error from the estimates without each unit."""
    units = len(without)
    return math.sqrt((units - 1) / units * float(np.sum((without - value) ** 2)))


def correlation_interval(
    coefficient: float,
    without: Float[np.ndarray, " unit"],
    variance: float,
) -> tuple[float, float]:
    """Return an interval of a correlation that holds for skewed data and within families.

    It is the jackknife's on Fisher's scale, with Student's t of (units − 1) degrees of freedom,
    widened to Fisher's normal interval where that is wider. NaN where fewer than 3 families can be
    left out with a defined correlation.

    Args:
        coefficient: The correlation.
        without: The correlation without each unit; empty to have Fisher's interval alone.
        variance: Large-sample variance of artanh of the coefficient; 0 to have the jackknife's
            alone, as for families.
    """
    few = len(without) < 3
    if few and not variance:
        return math.nan, math.nan
    low, high = fisher_interval(coefficient, variance)
    if not few:
        z = fisher_z(coefficient)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(without) - 1)
        half *= jackknife_error(fisher_z(without), float(z))
        low, high = min(low, float(np.tanh(z - half))), max(high, float(np.tanh(z + half)))
    return low, high


def fisher_interval(r: float, variance: float) -> tuple[float, float]:
    """Return Fisher's interval of a correlation, given the variance of artanh r."""
    if abs(r) >= 1 and math.isinf(variance):
        return -1.0, 1.0
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    with np.errstate(divide="ignore"):
        center = np.arctanh(np.clip(r, -1, 1))
    return float(np.tanh(center - half)), float(np.tanh(center + half))


def fisher_z(r: float | np.ndarray) -> np.ndarray:
    """Return artanh r, finite where r is ±1."""
    return np.asarray(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)))


def without_each(
    statistic: Callable[..., float], columns: Sequence[np.ndarray], units: Units
) -> Float[np.ndarray, " unit"]:
    """Return the statistic of the columns without each unit; NaN where it is undefined."""
    return np.array([statistic(*(c[mask] for c in columns)) for mask in units.left_out()])
