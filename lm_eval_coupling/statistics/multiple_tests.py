"""p-values adjusted for the number of tests."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import Values, is_constant
from lm_eval_coupling.statistics.resampling import Families, Units, permutation_p_value


def adjust_p_values(p: Values, method: Literal["holm", "fdr_bh"] = "holm") -> np.ndarray:
    """Return p-values adjusted by Holm or by Benjamini and Hochberg; NaN (no test) is not counted.

    Raises:
        CouplingError: If a value lies outside [0, 1] or the method is unknown.
    """
    if method not in ("holm", "fdr_bh"):
        raise CouplingError(f"got method={method!r}, expected 'holm' or 'fdr_bh'")
    p = np.asarray(p, dtype=np.float64)
    tested = ~np.isnan(p)
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise CouplingError(
            f"got p-values from {np.nanmin(p):g} to {np.nanmax(p):g}, "
            "expected numbers between 0 and 1"
        )
    adjusted = np.full(p.shape, math.nan)
    if tested.any():
        adjusted[tested] = (
            _holm(p[tested])
            if method == "holm"
            else stats.false_discovery_control(p[tested], method="bh")
        )
    return adjusted


def _holm(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted by Holm (1979), in their order."""
    # statsmodels' function collects garbage at every call, which takes 0.25 s each.
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def simultaneous_p_values(
    predictors: pd.DataFrame,
    score: pd.Series,
    *,
    family: Families | None = None,
    resamples: int = 4999,
    seed: int = 0,
) -> pd.Series:
    """Adjust the p-values of Pearson correlations for all predictors at once.

    Each is the share of permutations of the score in which the strongest of all correlations is
    as strong: single-step max-T (Westfall and Young 1993). Among predictors that say the same,
    such as one coupling at three ranks, it loses less than Bonferroni or Holm. The chance of any
    false claim is at most the level if the score has nothing to do with any predictor.

    Args:
        predictors: One observation a row; rows with a missing number are left out.
        score: The score of the same rows.
        family: Family of each row; families are permuted as wholes.
        resamples: Number of permutations.
        seed: Seed of the permutations.

    Returns:
        One value per predictor; NaN where it is constant or there are fewer than 4 complete rows.
    """
    rows = (predictors.notna().all(axis=1) & score.notna()).to_numpy()
    X, y = predictors[rows].to_numpy(np.float64), score[rows].to_numpy(np.float64)
    result = pd.Series(math.nan, predictors.columns, dtype=float)
    varying = [i for i in range(X.shape[1]) if len(X) and not is_constant(X[:, i])]
    if len(y) < 4 or is_constant(y) or not varying:
        return result
    units = Units.of(None if family is None else np.asarray(family)[rows], len(y))
    Z, z = stats.zscore(X[:, varying]), stats.zscore(y) / len(y)
    orders = units.permutations(resamples, np.random.default_rng(seed))
    strongest = np.abs(z[orders.places] @ Z).max(axis=1)
    result.iloc[varying] = [permutation_p_value(r, strongest, orders.are_all) for r in z @ Z]
    return result
