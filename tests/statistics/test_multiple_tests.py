"""One score and many predictors: no more false claims than promised, and more found than by
Bonferroni.
"""

import numpy as np
import pandas as pd
import pytest

from lm_eval_coupling.statistics import correlation, simultaneous_p_values


def hanging_together(rng, n, predictors, share):
    """Predictors of which each has ``share`` of its variance in common with the others."""
    common = rng.normal(size=(n, 1))
    return pd.DataFrame(share**0.5 * common + (1 - share) ** 0.5 * rng.normal(size=(n, predictors)))


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_size(share):
    """Of 200 data sets of noise about 5 % have any p below 0.05, however the twenty predictors hang
    together.
    """
    rng = np.random.default_rng(0)
    claims = [
        simultaneous_p_values(
            hanging_together(rng, 12, 20, share), pd.Series(rng.normal(size=12)), resamples=199
        ).min()
        < 0.05
        for _ in range(200)
    ]
    assert np.mean(claims) < 0.09


def test_power_beyond_bonferroni():
    """Of twenty predictors that say the same one correlation is found about as often as if it were
    alone.
    """
    rng, found, bonferroni = np.random.default_rng(1), 0, 0
    for _ in range(60):
        X = hanging_together(rng, 15, 20, 0.97)
        y = pd.Series(0.75 * X[0] + 0.66 * rng.normal(size=15))
        p = simultaneous_p_values(X, y, resamples=399)
        alone = simultaneous_p_values(X[[0]], y, resamples=399)
        found += p[0] < 0.05
        bonferroni += 20 * alone[0] < 0.05
        assert p[0] >= alone[0] - 0.02
    assert found > bonferroni + 8


def test_one_predictor_is_the_permutation_test():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=9), rng.normal(size=9)
    exact = correlation(x, y)
    found = simultaneous_p_values(pd.DataFrame({"x": x}), pd.Series(y))
    assert found["x"] == pytest.approx(exact.p, abs=0.03)


def test_what_cannot_be_asked():
    frame = pd.DataFrame({"same": [1.0] * 6, "x": [1.0, 2, 3, 4, 5, 6]})
    found = simultaneous_p_values(frame, pd.Series([1.0, 3, 2, 5, 4, 6]), resamples=99)
    assert np.isnan(found["same"]) and 0 < found["x"] < 0.2
    assert simultaneous_p_values(frame[:3], pd.Series([1.0, 2, 3])).isna().all()
