"""The finding speaks with one voice: what the robust test does not carry is not said."""

import numpy as np
import pandas as pd
import pytest
from fitted_runs import QUICK, save_model

from lm_eval_coupling.fit.finding_text import (
    describe_noise,
    describe_predictors,
    describe_training,
)
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.statistics import Corrected, Correlation, Reliability

CLAIMS = ("goes with higher", "goes with lower", "says something", "more strongly than log10")


def text(folder, models):
    """Save models of (name, coupling, score) and return the finding."""
    for i, (name, coupling, score) in enumerate(models):
        save_model(folder, name, coupling, {"arc": score}, n_params=10 ** (8 + (i * 7 % 5) / 4))
    return " ".join(fit_runs(folder, x=["coupling@10"], resamples=QUICK).words)


def test_an_outlier_makes_no_finding(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (2, 11))
    models = [(f"org/m{i}", 0.2 + x, 0.4 + y) for i, (x, y) in enumerate(noise.T)]
    words = text(tmp_path, [*models, ("org/far", 0.6, 0.9)])
    assert not any(claim in words for claim in CLAIMS)
    assert "It hangs on single members: without far the correlation is" in words


def test_within_families_and_across_are_told_apart(tmp_path):
    rng = np.random.default_rng(1)
    models = [
        (
            f"org/{'abcdef'[i // 5]}-{i + 1}b",
            0.1 + 0.1 * (i // 5) + 0.01 * (i % 5),
            0.1 + 0.12 * (i // 5) - 0.012 * (i % 5) + rng.normal(0, 0.001),
        )
        for i in range(30)
    ]
    words = text(tmp_path, models)
    assert "Higher coupling@10 goes with higher arc acc across models." in words
    assert "Higher coupling@10 goes with lower arc acc within families." in words
    assert "Within families the direction is the opposite of that across models." in words


def test_two_families_are_no_sample_of_families(tmp_path):
    rng = np.random.default_rng(2)
    models = [
        (f"org/{'ab'[i // 6]}-{i + 1}b", 0.2 + 0.2 * (i // 6), 0.3 + 0.3 * (i // 6))
        for i in range(12)
    ]
    noisy = [(n, x + rng.normal(0, 0.01), y + rng.normal(0, 0.01)) for n, x, y in models]
    words = text(tmp_path, noisy)
    assert not any(claim in words for claim in CLAIMS)
    assert "Fewer than 5 families: no conclusion can be drawn across families." in words
    assert "2 families are too few" in words and "without the family a" in words


@pytest.mark.parametrize(
    ("reliable", "corrected", "words"),
    [
        (Reliability(reason="the models do not differ"), None, "not estimable"),
        (Reliability(alpha=0.4, low=0.1, high=0.7), None, "mostly the documents' noise"),
        (None, Corrected(observed=0.9, reason="the reliability of y is not estimable"), "not esti"),
    ],
)
def test_reliability_that_is_not_known_is_not_printed(reliable, corrected, words):
    (sentence,) = describe_noise(reliable, corrected, "coupling@10", "acc")
    assert words in sentence and "predicts nothing" not in sentence


def test_predictors_that_one_of_many_scores_does_not_carry_are_not_counted():
    """Of 21 scores of noise the mean was "not beyond chance", and coupling "beyond chance"."""
    result = Correlation("pearson", 0.65, 0.08, 0.90, 0.03, n=12)
    correlated = {("mean", name, "pearson"): result for name in ("coupling@10", "log10_params")}
    rows = pd.DataFrame(
        {"score": "mean", "predictor": ["coupling@10", "log10_params"], "same_as": ""}
    )
    rows = rows.assign(p_simultaneous=0.03)
    for is_carried, verdict in ((False, "none goes with mean"), (True, "2 go with mean")):
        own = dict.fromkeys(rows["predictor"], is_carried)
        (words,) = describe_predictors(rows, correlated, "mean", own)
        assert verdict in words


def test_a_training_is_described_and_not_tested():
    of = ("a", "acc", "coupling@10")
    levels = Correlation("spearman", coefficient=0.99, p=0.001, low=0.9, high=1.0, n=20)
    changes = Correlation("spearman", coefficient=0.2, p=0.4, low=-0.2, high=0.6, n=19)
    (words,) = describe_training({(*of, "levels"): levels, (*of, "changes"): changes})
    assert words.startswith("Along the training of a: coupling@10 and acc have rank correlation")
    assert "p =" not in words and "goes with" not in words and "tests nothing" in words
