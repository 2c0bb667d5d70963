"""Many predictors of one score: how strong is the strongest correlation by chance, as these predictors hang together?"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.statistics.estimates import constant


def simultaneous_p_values(
    predictors: pd.DataFrame, score: pd.Series, *, resamples: int = 4999, seed: int = 0
) -> pd.Series:
    """p-values of Pearson correlations adjusted for all predictors at once, by permutations of the score.

    Each is twice the share of permutations in which the largest (or, of a negative one, the smallest) of all correlations is
    as large: single-step max-T (Westfall and Young 1993), both tails as of a single permutation test. Among predictors that
    say the same, such as one coupling at three ranks, it gives away less than Bonferroni or Holm. The chance of any false
    claim is at most the level, whatever the predictors' correlations, if the score has nothing to do with any of them.

    Args:
        predictors: an observation a row; rows with a missing number are left out, so give complete columns.
        score: of the same rows.
        resamples: permutations.
        seed: of the permutations.

    Returns:
        By predictor; NaN where it is constant or there are fewer than 4 complete rows.
    """
    known = predictors.notna().all(axis=1) & score.notna()
    X, y = predictors[known].to_numpy(np.float64), score[known].to_numpy(np.float64)
    found = pd.Series(math.nan, predictors.columns, dtype=float)
    varying = [i for i in range(X.shape[1]) if len(X) and not constant(X[:, i])]
    if len(y) < 4 or constant(y) or not varying:
        return found
    Z, z = stats.zscore(X[:, varying]), stats.zscore(y)
    observed, slack = Z.T @ z, 1e-9 * len(z)  # equal up to rounding counts as equal
    rng, above, below = np.random.default_rng(seed), np.zeros(len(varying)), np.zeros(len(varying))
    for _ in range(resamples):
        permuted = Z.T @ rng.permutation(z)
        above += permuted.max() >= observed - slack
        below += permuted.min() <= observed + slack
    found.iloc[varying] = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (1 + resamples))
    return found
