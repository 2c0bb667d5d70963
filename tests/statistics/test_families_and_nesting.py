"""Regressions against certified and published results, and in simulations whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from published import LONGLEY, OTHERS
from scipy import stats
from simulations import covers, draws, near, simulate, uniform

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    adjust_p_values,
    collinearity,
    correlation,
    family_effect,
    in_words,
    nested_models,
)

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


def test_longley_as_certified():
    """NIST's certified values of Longley's data: the coefficient of YEAR and R²."""
    found = nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS)
    assert (found.effect.value, found.effect.stderr) == pytest.approx(
        (1829.15146461355, 455.478499142212), rel=1e-8
    )
    assert found.with_predictor.r2 == pytest.approx(0.995479004577296, rel=1e-12)
    assert found.f == pytest.approx((1829.15146461355 / 455.478499142212) ** 2, rel=1e-8)
    assert found.partial.p == found.p == pytest.approx(found.p_f, abs=0.01)
    assert found.n == 16 and found.df == 9 and len(found.notes) == 2


def test_predictors_far_from_zero_are_those_near_it():
    """Beside a mean of 10⁹, R² came out as −31 and the covariate as a constant."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(24, 3)), columns=["score", "x", "size"])
    frame["score"] += frame["x"] + frame["size"]
    asked = {"score": "score", "predictor": "x", "covariates": ["size"], "resamples": 99}
    near, far = (nested_models(frame + at, **asked) for at in (0, 2.0**30))
    assert far.with_predictor.r2 == pytest.approx(near.with_predictor.r2, rel=1e-5)
    assert far.effect.value == pytest.approx(near.effect.value, rel=1e-5)
    assert far.partial.coefficient == pytest.approx(near.partial.coefficient, rel=1e-5)


def test_collinearity_of_longley():
    """The variance inflation factors that textbooks give for Longley's data; ratio of its
    eigenvalues 12220.
    """
    table = collinearity(LONGLEY, [*OTHERS, "YEAR"])
    assert table["vif"].round(2).tolist() == [135.53, 1788.51, 33.62, 3.59, 399.15, 758.98]
    assert table.attrs["condition_number"] ** 2 == pytest.approx(12220, rel=1e-3)
    assert table.loc["GNP", "note"] == "the other predictors explain more than 99.9% of GNP"
    assert table.loc["ARMED", "note"] == ""


def test_exact_dependence_is_said():
    frame = LONGLEY.assign(double=2 * LONGLEY["GNP"] + 1)
    table = collinearity(frame, ["GNP", "double", "POP"])
    assert (
        np.isinf(table["vif"]).tolist() == [True, True, False]
        and table.attrs["condition_number"] == math.inf
    )
    assert table.loc["double", "note"] == "the other predictors explain all of double"
    found = nested_models(frame, score="TOTEMP", predictor="double", covariates=["GNP", "POP"])
    assert found.reason == "GNP and double determine each other exactly" and math.isnan(found.p)
    assert "constant" in nested_models(frame.assign(one=1), score="TOTEMP", predictor="one").reason
    assert (
        "at least 8"
        in nested_models(frame[:7], score="TOTEMP", predictor="YEAR", covariates=OTHERS).reason
    )


def left_out(y, X, groups):
    """Each group predicted by a regression without it."""
    errors = means = 0.0
    for group in set(groups):
        own = np.array(groups) == group
        beta = np.linalg.lstsq(X[~own], y[~own], rcond=None)[0]
        errors += np.sum((y[own] - X[own] @ beta) ** 2)
        means += np.sum((y[own] - y[~own].mean()) ** 2)
    return 1 - errors / means


def family_frame(rng, families=6, each=4, share=1.0, effect=0.0, between=False):
    family = np.repeat(np.arange(families), each)
    x = rng.normal(size=families)[family] if between else rng.normal(size=len(family))
    y = (
        effect * x
        + math.sqrt(share) * rng.normal(size=families)[family]
        + rng.normal(size=len(family))
    )
    return pd.DataFrame(
        {
            "score": y,
            "coupling": x,
            "size": rng.normal(size=len(y)),
            "family": [f"f{i}" for i in family],
        }
    )


def test_predictions_of_what_was_left_out_against_refits():
    frame = family_frame(np.random.default_rng(0), effect=1.0).sample(frac=1, random_state=0)
    found = nested_models(
        frame, score="score", predictor="coupling", covariates=["size"], family="family"
    )
    y, one = frame["score"].to_numpy(), np.ones(len(frame))
    X = np.column_stack([one, frame["size"], frame["coupling"]])
    assert found.with_predictor.r2_left_out == pytest.approx(
        left_out(y, X, range(len(y))), rel=1e-10
    )
    assert found.with_predictor.r2_left_out_family == pytest.approx(
        left_out(y, X, list(frame["family"])), rel=1e-10
    )
    assert found.without.r2_left_out_family == pytest.approx(
        left_out(y, X[:, :2], list(frame["family"])), rel=1e-10
    )


def test_a_family_that_alone_determines_the_regression_cannot_be_left_out():
    frame = family_frame(np.random.default_rng(0)).assign(
        only_f0=lambda f: (f["family"] == "f0") * 1.0
    )
    found = nested_models(
        frame, score="score", predictor="coupling", covariates=["only_f0"], family="family"
    )
    assert math.isnan(found.with_predictor.r2_left_out_family) and not math.isnan(
        found.with_predictor.r2_left_out
    )
    assert "not possible" in in_words(found)


@pytest.mark.slow
def test_nested_models_have_their_size_coverage_and_power():
    """A predictor that only follows a covariate adds nothing, though it correlates strongly with
    the score.
    """

    def one(rng):
        size = rng.normal(size=25)
        follows, own = size + 0.7 * rng.normal(size=25), rng.normal(size=25)
        frame = pd.DataFrame(
            {
                "score": size + 0.6 * own + 0.5 * rng.normal(size=25),
                "size": size,
                "a": follows,
                "b": own,
            }
        )
        a, b = (
            nested_models(frame, score="score", predictor=name, covariates=["size"], resamples=399)
            for name in "ab"
        )
        gain = [f.with_predictor.r2_left_out > f.without.r2_left_out and f.p < 0.05 for f in (a, b)]
        return (
            a.p,
            covers(a.effect, 0),
            covers(b.effect, 0.6),
            correlation(follows, frame["score"], resamples=1).low > 0,
            *gain,
        )

    p, *rates = draws(one, 100)
    coverage, of_effect, correlated, false_gain, gain = np.mean(rates, axis=1)
    assert uniform(p) and near(coverage, 0.95, 100) and near(of_effect, 0.95, 100)
    assert correlated > 0.8 and false_gain < 0.1 and gain > 0.95


def test_mixed_model_of_balanced_families_is_the_fixed_effects_estimate():
    """Where the predictor has the same mean in every family, random and fixed levels give the same
    coefficient and error.
    """
    frame = family_frame(np.random.default_rng(5), effect=0.7)
    frame["coupling"] -= frame.groupby("family")["coupling"].transform("mean")
    X = np.column_stack([frame["coupling"], pd.get_dummies(frame["family"], dtype=float)])
    beta, squares = np.linalg.lstsq(X, frame["score"], rcond=None)[:2]
    stderr = math.sqrt(squares[0] / (24 - 7) / np.sum(frame["coupling"] ** 2))
    found = family_effect(frame, score="score", predictor="coupling", family="family")
    assert (found.effect.value, found.effect.stderr) == pytest.approx((beta[0], stderr), rel=1e-4)
    assert 0 < found.family_share < 1 and found.families == 6


def cr2(y, X, family):
    """Return Bell and McCaffrey's variance and degrees of freedom, by matrices of all rows."""
    bread, n = np.linalg.inv(X.T @ X), len(y)
    kept = np.eye(n) - X @ bread @ X.T
    variance, columns = np.zeros((X.shape[1],) * 2), []
    for name in dict.fromkeys(family):
        own = np.flatnonzero(np.array(family) == name)
        block = kept[np.ix_(own, own)]
        values, vectors = np.linalg.eigh(block)
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        score = X[own].T @ root @ (kept @ y)[own]
        variance += bread @ np.outer(score, score) @ bread
        columns.append(kept[:, own] @ root @ X[own] @ bread[:, -1])
    gram = np.array(columns) @ np.array(columns).T
    eigenvalues = np.linalg.eigvalsh(gram)
    return variance[-1, -1], eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def test_clustered_errors_against_the_sandwich():
    frame = family_frame(np.random.default_rng(6), effect=0.7)
    X, y = np.column_stack([np.ones(24), frame["coupling"]]), frame["score"].to_numpy()
    variance, df = cr2(y, X, list(frame["family"]))
    found = family_effect(
        frame, score="score", predictor="coupling", family="family", method="cluster"
    )
    assert found.effect.value == pytest.approx(np.polyfit(frame["coupling"], y, 1)[0])
    assert found.effect.stderr == pytest.approx(math.sqrt(variance))
    assert found.df == pytest.approx(df) and 1 < df <= 5
    assert found.effect.high - found.effect.value == pytest.approx(
        stats.t.ppf(0.975, df) * found.effect.stderr
    )


@pytest.mark.slow
def test_families_that_resemble_each_other_fool_plain_least_squares_only():
    """Nothing depends on the predictor, but both it and the score go by family: 12 families of 4
    models.
    """

    def one(rng):
        frame = family_frame(rng, families=12, between=True)
        mixed = family_effect(frame, score="score", predictor="coupling", family="family")
        plain = nested_models(
            frame, score="score", predictor="coupling", family="family", resamples=399
        )
        return mixed.p < 0.05, covers(mixed.effect, 0), plain.p < 0.05, plain.p_f < 0.05

    mixed, coverage, permuted, plain = simulate(one, 60)
    assert near(mixed, 0.05, 60) and near(coverage, 0.95, 60) and near(permuted, 0.05, 60)
    assert plain > 0.12


@pytest.mark.slow
@pytest.mark.parametrize("families", [6, 40])
def test_clustered_errors_have_their_size(families):
    def one(rng):
        frame = family_frame(rng, families=families, between=True)
        return (
            family_effect(
                frame, score="score", predictor="coupling", family="family", method="cluster"
            ).p
            < 0.05
        )

    assert near(simulate(one, 300), 0.05, 300, slack=0.01)


def test_families_that_cannot_be_told_apart_say_why():
    frame = family_frame(np.random.default_rng(0))
    of = {"score": "score", "predictor": "coupling", "family": "family"}
    assert "2 families" in family_effect(frame[:8], **of).reason
    assert "one model only" in family_effect(frame.assign(family=range(24)), **of).reason
    frame["score"] -= frame.groupby("family")["score"].transform("mean")
    none = family_effect(frame, **of)
    assert none.family_share < 1e-3 and any(
        "no variance between families" in note for note in none.notes
    )


def test_adjusted_p_values_as_published():
    """Benjamini and Hochberg (1995), section 4.1: of 15 tests at 0.05 Holm rejects 3 and their
    procedure 4.
    """
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.324,
        0.4262,
        0.5719,
        0.6528,
        0.759,
        1,
    ]
    assert (adjust_p_values(p, "holm") <= 0.05).tolist() == [True] * 3 + [False] * 12
    assert (adjust_p_values(p, "fdr_bh") <= 0.05).tolist() == [True] * 4 + [False] * 11
    assert adjust_p_values(p, "fdr_bh")[3] == pytest.approx(0.0095 * 15 / 4)


def test_missing_tests_do_not_count():
    adjusted = adjust_p_values([0.01, math.nan, 0.04], "holm")
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.04]) and math.isnan(adjusted[1])
    assert np.isnan(adjust_p_values([math.nan])).all()
    with pytest.raises(CouplingError, match="between 0 and 1"):
        adjust_p_values([0.5, 1.2])
