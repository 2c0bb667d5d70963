"""Reliability and what is corrected by it, on data whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lm_eval_coupling.statistics import (
    corrected_for_attenuation,
    correlation,
    document_reliability,
    reliability_from_errors,
)


def crossed(rng, models, documents, noise, spread=1.0):
    """Models with a true level each, documents with an effect common to all, noise; the truth and
    the matrix.
    """
    truth = rng.normal(0, spread, models)
    return truth, truth[:, None] + rng.normal(0, 2, documents) + rng.normal(
        0, noise, (models, documents)
    )


def test_alpha_by_hand():
    """Cronbach's alpha of a matrix whose item variances are counted by hand: k/(k−1)·(1 − Σ
    var_item/var_total).
    """
    X = np.array([[1.0, 2, 3], [2, 2, 5], [4, 6, 5], [5, 5, 9]])
    k = X.shape[1]
    expected = k / (k - 1) * (1 - X.var(axis=0, ddof=1).sum() / X.sum(axis=1).var(ddof=1))
    found = document_reliability(pd.DataFrame(X))
    assert found.alpha == pytest.approx(expected, abs=1e-12) and (
        found.models,
        found.documents,
    ) == (4, 3)


@pytest.mark.parametrize(("documents", "noise"), [(20, 3.0), (100, 3.0), (100, 12.0)])
def test_the_truth_is_found(documents, noise):
    """True reliability is 1/(1 + noise²/n): the mean over many data sets of many models comes near
    it.
    """
    rng = np.random.default_rng(0)
    true = 1 / (1 + noise**2 / documents)
    found = [
        document_reliability(pd.DataFrame(crossed(rng, 60, documents, noise)[1]), splits=40)
        for _ in range(60)
    ]
    assert np.mean([f.alpha for f in found]) == pytest.approx(true, abs=0.03)
    assert np.mean([f.split_half for f in found]) == pytest.approx(true, abs=0.05)


def test_the_interval_covers():
    """Coverage of Feldt's interval is its 95 %, for ten models as for many: of 400 data sets 92 to
    98 % hold the truth.
    """
    rng = np.random.default_rng(1)
    true = 1 / (1 + 9 / 30)
    found = [
        document_reliability(pd.DataFrame(crossed(rng, 10, 30, 3.0)[1]), splits=1)
        for _ in range(400)
    ]
    assert 0.92 < np.mean([f.low <= true <= f.high for f in found]) < 0.98


def test_how_many_documents_are_enough():
    """With noise three times the spread of models a reliability of 0.9 takes 81 documents."""
    rng = np.random.default_rng(2)
    found = document_reliability(pd.DataFrame(crossed(rng, 3000, 50, 3.0)[1]), splits=1)
    assert found.enough == pytest.approx(81, rel=0.1)


def test_noise_has_no_reliability():
    rng = np.random.default_rng(3)
    found = [
        document_reliability(pd.DataFrame(rng.normal(size=(8, 40))), splits=20) for _ in range(200)
    ]
    estimable = [f for f in found if f.reason is None]
    assert 0.3 < len(estimable) / len(found) < 0.7
    assert all("larger than the differences" in f.reason for f in found if f.reason)
    assert np.mean([f.low > 0 for f in found]) < 0.06  # one side of a 95 % interval


def test_documents_that_a_model_lacks_are_left_out_for_all():
    rng = np.random.default_rng(4)
    X = pd.DataFrame(crossed(rng, 6, 30, 1.0)[1])
    missing = X.copy()
    missing.iloc[2, :10] = np.nan
    assert document_reliability(missing) == document_reliability(X.iloc[:, 10:])
    missing.iloc[3, 10:] = np.nan
    assert (
        document_reliability(missing).reason
        == "6 models have 0 documents in common, at least 3 and 2 are needed"
    )
    assert (
        document_reliability(pd.DataFrame(np.tile(rng.normal(size=20), (5, 1)))).reason
        == "the models do not differ"
    )


def test_errors_give_the_same_reliability_where_documents_are_not_shared():
    """Without a document in common, noise is all of a model's error, and its standard errors tell
    the reliability.
    """
    rng = np.random.default_rng(5)
    truth = rng.normal(size=2000)
    samples = truth[:, None] + rng.normal(0, 3, (2000, 40))
    means, errors = (
        pd.Series(samples.mean(axis=1)),
        pd.Series(samples.std(axis=1, ddof=1) / 40**0.5),
    )
    assert reliability_from_errors(means, errors) == pytest.approx(1 / (1 + 9 / 40), abs=0.02)
    assert np.isnan(reliability_from_errors(means[:2], errors[:2]))


def test_a_corrected_correlation_finds_the_truth():
    """Two numbers of true correlation 0.6, measured with reliabilities 0.7 and 0.8, correlate by
    0.45.
    """
    rng = np.random.default_rng(6)
    covers, estimates, observed = [], [], []
    for _ in range(300):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40).T
        x, y = (
            a + rng.normal(0, (1 / 0.7 - 1) ** 0.5, 40),
            b + rng.normal(0, (1 / 0.8 - 1) ** 0.5, 40),
        )
        found = correlation(x, y, resamples=1)
        corrected = corrected_for_attenuation(found, 0.7, 0.8)
        # Quotients beyond 1 have no estimate; none of 40 models comes near it here.
        estimates.append(corrected.coefficient)
        observed.append(found.coefficient)
        covers.append(corrected.low <= 0.6 <= corrected.high)
    assert np.mean(observed) == pytest.approx(0.6 * 0.56**0.5, abs=0.03)
    assert np.mean(estimates) == pytest.approx(0.6, abs=0.03) and 0.92 < np.mean(covers) < 0.98


def test_what_has_no_reliability_is_not_corrected():
    found = correlation(range(10), [1, 3, 2, 5, 4, 7, 6, 9, 8, 10], resamples=99)
    assert (
        corrected_for_attenuation(found, 0.2, 0.9).reason
        == "the reliability of x is 0.20, less than 0.3"
    )
    assert (
        corrected_for_attenuation(found, 0.9, np.nan).reason
        == "the reliability of y is not estimable"
    )
    beyond = corrected_for_attenuation(found, 0.31, 0.31)
    assert np.isnan(beyond.coefficient) and "larger than its reliabilities" in beyond.reason
    assert "not estimable" in corrected_for_attenuation(found, -5.58, 0.9).reason


def test_without_an_interval_the_corrected_correlation_has_none():
    """Cutting NaN at ±1 made it 1."""
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    found = correlation(x, y, family=list("aaaaabbbbb"), resamples=99)
    corrected = corrected_for_attenuation(found, 0.9, 0.8)
    assert corrected.coefficient == pytest.approx(found.coefficient / 0.72**0.5)
    assert np.isnan(corrected.low) and np.isnan(corrected.high)
    assert corrected.reason == "no interval from 2 families"


def test_the_f_distribution_is_that_of_the_ratio():
    """Without differences (1 − alpha) has the distribution of F, of which alpha > 0 is a part."""
    rng = np.random.default_rng(7)
    ratios = np.array(
        [
            1 - document_reliability(pd.DataFrame(rng.normal(size=(6, 12))), splits=1).alpha
            for _ in range(500)
        ]
    )
    known, law = ratios[~np.isnan(ratios)], stats.f(5 * 11, 5)
    assert len(known) / 500 == pytest.approx(law.cdf(1), abs=0.07)
    assert stats.kstest(known, lambda v: law.cdf(v) / law.cdf(1)).pvalue > 0.01
