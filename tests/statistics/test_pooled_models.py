"""Several models over the same documents: as many observations as documents, in simulations whose
truth is known.
"""

import functools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulations import covers, draws, near, uniform

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    auroc_together,
    auroc_within,
    in_words,
    logistic_together,
    pooled_models,
)

pytest.importorskip("statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed")
COLUMNS = {"model": "model", "task": "task", "document": "doc"}


def answers(rng, *, models=3, documents=80, shift=0.0):
    """Models agree on what is hard, and on which prompts are coupled; ``shift`` of the right
    answers' values.
    """
    hard, coupled = rng.normal(size=documents), rng.normal(size=documents)
    frames = []
    for i in range(models):
        right = (0.9 * hard + 0.45 * rng.normal(size=documents) + 0.3 * i > 0).astype(int)
        value = 0.9 * coupled + math.sqrt(1 - 0.81) * rng.normal(size=documents) + shift * right
        value = (value + 5 * i) * (i + 1)  # models differ in it by more than their documents do
        frames.append(
            pd.DataFrame(
                {
                    "value": value,
                    "right": right,
                    "length": rng.normal(size=documents),
                    "model": f"m{i}",
                }
            )
        )
    doc = np.tile(np.arange(documents), models)
    return pd.concat(frames, ignore_index=True).assign(
        doc=doc, task=np.where(doc % 2, "odd", "even")
    )


def test_one_model_is_what_it_is_alone():
    frame = answers(np.random.default_rng(0), models=1, shift=0.5)
    found = auroc_together(frame, "value", "right", **COLUMNS)
    _, alone = auroc_within(frame, "value", "right", "task")
    assert (found.auroc, found.stderr, found.low, found.high) == pytest.approx(
        (alone.auroc, alone.stderr, alone.low, alone.high)
    )
    assert (found.right, found.wrong, found.tasks, found.models) == (alone.right, alone.wrong, 2, 1)


def test_copies_of_a_model_are_no_more_evidence():
    one = answers(np.random.default_rng(1), models=1, shift=0.5)
    three = pd.concat([one.assign(model=name) for name in "abc"], ignore_index=True)
    alone, found = (auroc_together(frame, "value", "right", **COLUMNS) for frame in (one, three))
    assert (found.auroc, found.stderr, found.p) == pytest.approx(
        (alone.auroc, alone.stderr, alone.p)
    )
    assert found.right == alone.right and found.models == 3  # documents, not answers
    kwargs = COLUMNS | {"correct": "right", "predictor": "value", "controls": ["length"]}
    alone, found = (logistic_together(frame, **kwargs) for frame in (one, three))
    assert found.odds_ratio == pytest.approx(
        alone.odds_ratio, rel=0.01
    )  # per a standard deviation of n - 1
    assert found.log_odds.stderr == pytest.approx(
        alone.log_odds.stderr, rel=0.03
    )  # but for small-sample factors
    assert (found.models, found.tasks, found.n) == (3, 2, 240)


@functools.cache
def areas(shift):
    """Simulate pooled areas under the curve: whether they cover the truth, and their p-values."""
    truth = stats.norm.cdf(shift / math.sqrt(2))

    def one(rng):
        found = auroc_together(answers(rng, shift=shift), "value", "right", **COLUMNS)
        return covers(found, truth), found.p

    return draws(one, 300)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_answers_to_one_document_count_as_one(shift):
    covered, p = areas(shift)
    assert near(covered.mean(), 0.95, 300, slack=0.02)  # asymptotic
    assert uniform(p) if shift == 0 else np.mean(p < 0.05) > 0.75


@pytest.mark.slow
def test_taken_for_independent_they_mislead():
    """The same answers, each as an observation of its own, find what is not there."""

    def one(rng):
        frame = answers(rng)
        _, naive = auroc_within(
            frame.assign(task=frame["model"] + frame["task"]), "value", "right", "task"
        )
        return naive.p < 0.05

    _, p = areas(0.0)  # of the same answers
    assert draws(one, 250).mean() > 0.1 and near(np.mean(p < 0.05), 0.05, 300, slack=0.02)


@pytest.mark.slow
def test_odds_of_answers_to_one_document_are_robust():
    def one(rng):
        frame = answers(rng)
        found = logistic_together(frame, correct="right", predictor="value", **COLUMNS)
        return found.p < 0.05, found.low <= 1 <= found.high

    rejected, covered = draws(one, 200)
    assert near(rejected.mean(), 0.05, 200, slack=0.02) and near(
        covered.mean(), 0.95, 200, slack=0.02
    )


def test_what_cannot_be_told_is_said(monkeypatch):
    frame = answers(np.random.default_rng(2))
    lacking = frame.assign(right=lambda t: t["right"].where(t["model"] != "m1", 1))
    found = auroc_together(lacking, "value", "right", **COLUMNS)
    assert (found.models, found.dropped) == (2, 80)
    assert "within 2 tasks of 2 models" in in_words(found, x="coupling@10")
    nobody = auroc_together(frame.assign(right=1), "value", "right", **COLUMNS)
    assert math.isnan(nobody.auroc) and "no model has 2 right and 2 wrong" in nobody.reason
    with pytest.raises(
        CouplingError,
        match="got two rows of model m0, task even, doc 0, expected one of each document",
    ):
        auroc_together(pd.concat([frame, frame.head(1)]), "value", "right", **COLUMNS)
    monkeypatch.setattr(pooled_models, "LEVELS", 5)
    many = logistic_together(frame, correct="right", predictor="value", **COLUMNS)
    assert (
        many.reason == "6 tasks of models have a level each, which is more than 5" and many.n == 240
    )
    monkeypatch.undo()
    constant = logistic_together(
        frame.assign(value=1.0), correct="right", predictor="value", **COLUMNS
    )
    assert math.isnan(constant.odds_ratio) and constant.reason
    told = in_words(logistic_together(frame, correct="right", predictor="value", **COLUMNS))
    assert "the task and the model held fixed" in told and "240 answers" in told


def without_conclusion():
    """Two models with 6 right and 6 wrong answers to task t, all right in easy, wrong in hard."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "model": model,
            "task": task,
            "doc": doc,
            "value": rng.normal() + 3 * right,
            "right": right,
        }
        for model in "ab"
        for task, documents in (("t", 12), ("easy", 40), ("hard", 40))
        for doc in range(documents)
        for right in [{"t": doc % 2, "easy": 1, "hard": 0}[task]]
    ]
    return pd.DataFrame(rows)


def test_answers_of_tasks_that_are_left_out_do_not_count():
    """46 right and 46 wrong answers of 3 tasks were enough for a conclusion from 6 and 6 of one."""
    found = auroc_together(without_conclusion(), "value", "right", **COLUMNS)
    assert (found.right, found.wrong, found.tasks, found.dropped) == (6, 6, 1, 160)
    assert "6 answers of one kind are too few to conclude" in in_words(found)
    nobody = auroc_together(without_conclusion().query("task != 't'"), "value", "right", **COLUMNS)
    assert (nobody.right, nobody.wrong, nobody.tasks, nobody.models) == (0, 0, 0, 0)
    assert nobody.dropped == 160 and nobody.reason
    odds = logistic_together(without_conclusion(), correct="right", predictor="value", **COLUMNS)
    assert (odds.tasks, odds.rarer, odds.dropped) == (1, 6, 160)


def test_a_task_counts_if_one_model_has_both_answers():
    frame = without_conclusion()
    frame.loc[(frame["model"] == "a") & (frame["task"] == "easy") & (frame["doc"] < 5), "right"] = 0
    found = auroc_together(frame, "value", "right", **COLUMNS)
    assert (found.right, found.wrong, found.tasks, found.dropped) == (41, 11, 2, 120)


def test_models_of_a_constant_predictor_do_not_count():
    """Their answers were dropped, but counted among the models and the rarer answers."""
    frame = answers(np.random.default_rng(2))
    few = frame[(frame["model"] != "m2") | (frame["doc"] < 20)]
    few = few.assign(value=few["value"].where(few["model"] == "m2", 1.0))
    found = logistic_together(few, correct="right", predictor="value", **COLUMNS)
    alone = few[few["model"] == "m2"]
    alone = alone[alone.groupby("task")["right"].transform("nunique") > 1]
    assert found.models == 1 and found.n == len(alone) and found.dropped == len(few) - len(alone)
    assert found.rarer == alone["right"].value_counts().min()


@pytest.mark.parametrize("levels", [pooled_models.LEVELS, 1])
def test_answers_that_are_neither_right_nor_wrong_are_refused(monkeypatch, levels):
    """0.5 counted as wrong."""
    monkeypatch.setattr(pooled_models, "LEVELS", levels)
    frame = answers(np.random.default_rng(2)).astype({"right": float})
    frame.loc[3, "right"] = 0.5
    match = r"got 0.5 as correct, expected 0 \(wrong\) or 1 \(right\) for every document"
    with pytest.raises(CouplingError, match=match):
        auroc_together(frame, "value", "right", **COLUMNS)
    with pytest.raises(CouplingError, match=match):
        logistic_together(frame, correct="right", predictor="value", **COLUMNS)
