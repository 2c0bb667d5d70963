"""Findings in words claim no more than their numbers."""

import math

import numpy as np
import pandas as pd
import pytest
from published import LONGLEY, OTHERS

from lm_eval_coupling.statistics import (
    Correlation,
    auroc,
    compare_correlations,
    correlation,
    exponential_fit,
    family_effect,
    in_words,
    line_fit,
    logistic_effect,
    nested_models,
)

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


def test_words_state_what_was_found():
    x = np.arange(20.0)
    words = in_words(correlation(x, x + 3 * np.sin(7 * x)), x="coupling", y="accuracy")
    assert (
        words.startswith("Pearson correlation of coupling (x) with accuracy (y): 0.9")
        and "20 models" in words
    )
    assert "95% interval 0." in words and words.endswith(
        "Higher coupling goes with higher accuracy."
    )
    assert "goes with lower accuracy" in in_words(
        correlation(x, -x + 3 * np.sin(7 * x)), y="accuracy"
    )
    assert "goes with lower score" in in_words(line_fit(x, -x + 3 * np.sin(7 * x)))
    falling = in_words(exponential_fit(x, np.exp(-0.2 * x) + 0.01 * np.sin(7 * x)))
    assert "goes with lower score, and a straight line fits worse" in falling


def findings(rng, n):
    frame = pd.DataFrame(rng.normal(size=(n, 4)), columns=["score", "coupling", "size", "other"])
    frame["correct"], frame["family"] = rng.permutation(n) % 2, np.arange(n) // 3
    of = {"score": "score", "predictor": "coupling"}
    yield correlation(frame["coupling"], frame["score"], resamples=199)
    yield correlation(frame["coupling"], frame["score"], method="spearman", resamples=199)
    yield compare_correlations(frame["score"], frame["coupling"], frame["other"], resamples=199)
    yield line_fit(frame["coupling"], frame["score"])
    yield exponential_fit(frame["coupling"], frame["score"], resamples=199)
    yield nested_models(frame, **of, covariates=["size"], family="family", resamples=199)
    yield family_effect(frame, **of, family="family", method="cluster")
    yield auroc(frame["coupling"], frame["correct"])
    yield logistic_effect(frame, correct="correct", predictor="coupling", controls=["size"])


CLAIMS = ("goes with", "tend to have", "more strongly", "coupling says something")


def test_words_claim_nothing_from_nothing():
    """Nothing depends on anything; a claim may be made no more often than the test's 5% (few
    families: the note says so).
    """
    claims = []
    for i in range(25):
        for found in findings(np.random.default_rng([1, i]), 24):
            words = in_words(found)
            claimed = any(claim in words for claim in CLAIMS)
            cautious = ("o evidence", "o clear evidence", "too few")
            assert claimed or any(caution in words for caution in cautious), words
            assert not claimed or found.p < 0.05
            claims.append(claimed)
    assert 0 < np.mean(claims) < 0.1


@pytest.mark.parametrize("n", [3, 5, 7])
def test_words_claim_nothing_from_few(n):
    for found in findings(np.random.default_rng(0), n):
        words = in_words(found)
        assert "too few" in words or "undefined" in words or "no interval" in words, words
        assert not any(claim in words for claim in CLAIMS)


def test_words_need_interval_and_test_to_agree():
    def words(low, p):
        return in_words(Correlation("pearson", coefficient=0.4, low=low, high=0.7, p=p, n=20))

    assert words(0.01, 0.04).endswith("Higher coupling goes with higher score.")
    assert words(-0.01, 0.04).endswith(
        "No evidence that coupling and score go together: the interval includes 0."
    )
    assert words(0.01, 0.06).endswith(
        "No clear evidence that coupling and score go together: the test does not reject chance."
    )
    assert words(math.nan, 0.04).endswith("Higher coupling goes with higher score.")


def test_words_heed_the_adjusted_p_value():
    x = np.arange(20.0)
    found = correlation(x, x + 8 * np.sin(7 * x))
    assert found.p < 0.05 and "goes with higher" in in_words(found)
    words = in_words(found, p_adjusted=0.2)
    assert "adjusted p = 0.2" in words and "No clear evidence" in words and "goes with" not in words


def test_words_count_what_was_left_out_and_keep_the_notes():
    assert "1 observations were left out" in in_words(
        correlation([*range(9), math.nan], [*range(9), 3])
    )
    assert "is hard to tell" in in_words(
        nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS)
    )
    scattered = line_fit(
        np.arange(9.0), np.arange(9) + 5 * np.sin(np.arange(9)), y_error=np.full(9, 0.1)
    )
    assert "times as much as their errors explain" in in_words(scattered)
