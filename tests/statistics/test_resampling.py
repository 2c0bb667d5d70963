"""Families are permuted and left out as wholes; nothing is claimed that hangs on one member."""

import math

import numpy as np
import pandas as pd
import pytest
from simulated_models import families, in_families
from simulations import draws, uniform

from lm_eval_coupling.statistics import (
    compare_correlations,
    correlation,
    family_effect,
    in_words,
    influence,
    nested_models,
    simultaneous_p_values,
)
from lm_eval_coupling.statistics.resampling import Units

pytest.importorskip("statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed")


def test_orders_move_families_of_one_size_and_members_within():
    family = list("aabbcccd")
    units = Units.of(family, 8)
    orders, _ = units.permutations(400, np.random.default_rng(0))
    assert units.number == units.families == 4
    assert (np.sort(orders, axis=1) == np.arange(8)).all()
    names = np.array(family)[orders]
    assert set(map("".join, names)) == {"aabbcccd", "bbaacccd"}
    assert len({tuple(order) for order in orders[:, 4:7].tolist()}) == 6


@pytest.mark.parametrize("family", [None, ["a"] * 5, list("abcde")])
def test_one_family_or_one_for_each_model_makes_models_the_units(family):
    units = Units.of(family, 5)
    assert units.families == 0 and units.number == 5
    orders, are_all = units.permutations(200, np.random.default_rng(0))
    assert len(orders) == 120 and are_all


def test_no_correlation_has_a_p_of_one():
    x = [-2.0, -1, 0, 1, 2, -2, -1, 0, 1, 2]
    y = [4.0, 1, 0, 1, 4, 4, 1, 0, 1, 4]
    for method in ("pearson", "spearman", "kendall"):
        assert correlation(x, y, method=method, resamples=499).p == 1
    p = simultaneous_p_values(pd.DataFrame({"x": x}), pd.Series(y), resamples=499)
    assert p["x"] == 1


def test_a_family_that_is_left_out_is_left_out_as_a_whole():
    rng = np.random.default_rng(0)
    family = families(6)
    x, y = in_families(rng, family, 0.5)
    found = correlation(x, y, family=family, resamples=99)
    without = [np.corrcoef(x[family != g], y[family != g])[0, 1] for g in range(6)]
    z = np.arctanh(without) - np.arctanh(found.coefficient)
    half = 2.570582 * math.sqrt(5 / 6 * np.sum(z**2))  # Student's t of 5 degrees of freedom
    expected = np.tanh(np.arctanh(found.coefficient) + np.array([-half, half]))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-6)
    assert found.families == 6 and "of 6 families" in in_words(found)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["normal", "lognormal"])
def test_models_in_families_do_not_make_findings(data):
    """32 models in 9 families, whose half of the variance lies between families."""
    family = np.repeat(np.arange(9), [1, 2, 3, 4, 4, 4, 4, 5, 5])

    def one(rng):
        x, y = in_families(rng, family, data=data)
        seed = int(rng.integers(2**31))
        as_families = correlation(x, y, family=family, resamples=199, seed=seed)
        return as_families.p, correlation(x, y, resamples=199, seed=seed).p

    p, single = draws(one, 300)
    assert uniform(p) and np.mean(single < 0.05) > np.mean(p < 0.05)


def test_few_families_conclude_nothing():
    family = np.repeat(np.arange(4), 5)
    x = family + np.linspace(0, 0.1, 20)
    found = correlation(x, x + 0.01 * np.sin(9 * x), family=family, resamples=199)
    assert "4 families are too few to conclude anything." in in_words(found)


def test_strengths_are_compared_whatever_their_signs():
    """A rival of a stronger, negative correlation is stronger, also when turned around."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=60)
    weak, strong = y + 2 * rng.normal(size=60), -y + 0.3 * rng.normal(size=60)
    found = compare_correlations(y, weak, strong, resamples=999)
    mirrored = compare_correlations(y, strong, -weak, resamples=999)
    assert found.first > 0 > found.second and found.difference < 0 and found.p < 0.05
    assert mirrored.difference == pytest.approx(-found.difference)
    assert mirrored.p == pytest.approx(found.p, abs=0.02)
    assert "rival goes with score more strongly than coupling does" in in_words(
        found, other="rival"
    )
    same = compare_correlations(y, weak, -weak)
    assert same.reason == "the predictors determine each other exactly" and math.isnan(same.p)


def test_an_outlier_is_named_and_claims_nothing():
    rng = np.random.default_rng(2)
    x, y = np.append(rng.normal(size=11), 40), np.append(rng.normal(size=11), 40)
    frame = pd.DataFrame({"score": y, "coupling": x, "size": rng.normal(size=12)})
    labels = [f"m{i}" for i in range(12)]
    assert "goes with" not in in_words(correlation(x, y, resamples=999))
    decisive = [row.without for row in influence(x, y, labels, resamples=199) if row.decides]
    assert decisive == ["m11"]
    found = nested_models(frame, score="score", predictor="coupling", covariates=["size"])
    assert found.p_f < 0.001 and "says something" not in in_words(found)


def test_what_the_correlation_does_not_carry_is_not_said():
    rng = np.random.default_rng(3)
    size, own = rng.normal(size=(2, 30))
    frame = pd.DataFrame({"score": size + own, "coupling": own, "size": size})
    found = nested_models(frame, score="score", predictor="coupling", covariates=["size"])
    assert "says something" in in_words(found)
    assert "the correlation itself is not beyond chance" in in_words(found, carried=False)


def test_each_family_is_left_out_too():
    x = np.arange(9.0)
    rows = influence(x, x**2, list("abcdefghi"), family=list("uuuvvvwxy"), resamples=99)
    assert [r.without for r in rows if r.kind == "family"] == ["u", "v"] and len(rows) == 11
    without = next(r for r in rows if r.without == "u")
    assert without.coefficient == pytest.approx(np.corrcoef(x[3:], x[3:] ** 2)[0, 1])
    assert influence(x[:3], x[:3], list("abc")) == []


def test_random_levels_are_at_the_maximum_of_the_likelihood():
    """Within six families the score falls by 1 per unit, between them it rises (Simpson)."""
    rng = np.random.default_rng(0)
    family, inside = np.repeat(np.arange(6), 5), np.tile(np.arange(5) - 2.0, 6)
    frame = pd.DataFrame(
        {
            "score": family - 0.1 * inside + rng.normal(0, 0.05, 30),
            "coupling": family + 0.1 * inside,
            "family": family,
        }
    )
    of = {"score": "score", "predictor": "coupling", "family": "family"}
    found = family_effect(frame, **of)
    assert found.effect.value == pytest.approx(-1, abs=0.2) and found.family_share > 0.99
    turned = family_effect(frame.assign(coupling=lambda f: -1e6 * f["coupling"]), **of)
    assert turned.effect.value == pytest.approx(-found.effect.value / 1e6, rel=1e-4)
