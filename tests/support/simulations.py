"""What simulations of a statistic have in common.

They are seeded. A rate over N of them may differ from the truth by four Monte-Carlo standard
errors; where a method is approximate in samples of this size, the slack that is granted beyond that
is written beside it.
"""

import math

import numpy as np
from scipy import stats


def draws(one, n):
    """Each number that ``one`` returns, over n seeded simulations."""
    return np.array([one(np.random.default_rng([20240717, i])) for i in range(n)], dtype=float).T


def simulate(one, n):
    """Their means."""
    return draws(one, n).mean(axis=-1)


def uniform(p):
    """Whether p-values are spread as they must be where there is nothing to find; sees tests that
    never reject, too.
    """
    return stats.kstest(p, "uniform").pvalue > 1e-3


def near(rate, expected, n, slack=0.0):
    return abs(rate - expected) <= 4 * math.sqrt(expected * (1 - expected) / n) + slack


def normal_pair(rng, n, rho):
    x = rng.normal(size=n)
    return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)


def covers(found, truth):
    return found.low <= truth <= found.high
