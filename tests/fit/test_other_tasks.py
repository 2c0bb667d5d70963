"""The other tasks' scores as a rival: computed naively, and on models whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from test_rivals import QUICK, save_model

from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.fit.other_tasks import add_other_tasks, left_out_summaries


def rows_of(scores):
    return pd.DataFrame(
        {"label": f"m{m}", "score_of": f"t{t}", "score": value}
        for m, of_model in enumerate(scores)
        for t, value in enumerate(of_model)
    )


def naive(scores, model, task):
    """Mean and deviation of every other task over the other models, one by one."""
    others = [m for m in range(len(scores)) if m != model]
    z, standardized = [], []
    for t in range(len(scores[0])):
        if t == task:
            continue
        column = [scores[m][t] for m in others]
        mean = sum(column) / len(column)
        sd = math.sqrt(sum((v - mean) ** 2 for v in column) / (len(column) - 1))
        z.append((scores[model][t] - mean) / sd)
        standardized.append([(v - mean) / sd for v in column])
    covariance = np.array(standardized) @ np.array(standardized).T
    direction = np.linalg.eigh(covariance)[1][:, -1]
    direction = direction * np.sign(direction.sum())
    return sum(z) / len(z), float(np.dot(z, direction))


def test_both_are_seen_from_the_other_models():
    scores = np.random.default_rng(0).uniform(size=(7, 4)).tolist()
    rows = add_other_tasks(rows_of(scores), [])
    for row in rows.itertuples():
        mean, component = naive(scores, int(row.label[1:]), int(row.score_of[1:]))
        assert row.other_tasks_mean == pytest.approx(mean, rel=1e-9)
        assert row.other_tasks_component == pytest.approx(component, rel=1e-9)


def test_a_models_own_outlier_does_not_shape_what_it_is_measured_by():
    scores = np.random.default_rng(1).uniform(size=(6, 3))
    before, _ = left_out_summaries(scores)
    scores[0] *= 1000
    after, _ = left_out_summaries(scores)
    center, deviation = scores[1:].mean(axis=0), scores[1:].std(axis=0, ddof=1)
    assert after[0] == pytest.approx(((scores[0] - center) / deviation).mean())
    assert after[0] > 100 * abs(before[0])


def test_tasks_that_a_model_lacks_count_for_no_other():
    scores = np.random.default_rng(2).uniform(size=(5, 3)).tolist()
    scores[2][1] = math.nan
    notes = []
    rows = add_other_tasks(rows_of(scores), notes).set_index(["label", "score_of"])
    without = [[a, c] for a, _, c in scores]
    mean, _ = naive(without, 0, 1)
    assert rows.loc[("m0", "t2"), "other_tasks_mean"] == pytest.approx(naive(without, 0, 1)[0])
    assert math.isfinite(rows.loc[("m2", "t1"), "other_tasks_mean"]) and mean == mean
    assert notes == ["no rival of the other tasks' scores, as models lack them: t1"]


@pytest.mark.parametrize("scores", [np.ones((6, 1)), np.eye(3), np.ones((5, 3))])
def test_nothing_to_compare_with_is_undefined(scores):
    rows = add_other_tasks(rows_of(scores.tolist()), [])
    assert rows[["other_tasks_mean", "other_tasks_component"]].isna().all(axis=None)


TASKS = ("arc", "hella", "wino", "truth", "mmlu")


def models(folder, share_of_arc):
    """Scores of five tasks follow one ability; that of arc has a part of its own, as has coupling.

    Coupling knows the ability less well than four other tasks do.
    """
    rng = np.random.default_rng(3)
    for i in range(16):
        ability, own = rng.normal(size=2)
        score_of = {task: 0.5 + 0.05 * ability + 0.005 * rng.normal() for task in TASKS}
        score_of["arc"] += 0.03 * share_of_arc * own

        def change(run, score_of=score_of):
            for task, score in score_of.items():
                run["results"][task]["acc,none"] = score

        coupling = 0.3 + 0.02 * (ability + share_of_arc * own) + 0.01 * rng.normal()
        save_model(folder, f"m{i}", coupling, 0.5, tasks=TASKS, change=change)
    return fit_runs(folder, x=["coupling@10"], resamples=QUICK)


def test_a_predictor_that_the_other_tasks_imply_adds_nothing_and_says_so(tmp_path):
    findings = models(tmp_path, share_of_arc=0)
    text = " ".join(findings.words)
    assert "coupling@10 adds nothing beyond chance to what the other tasks say" in text
    nested = findings.tables["nested"].set_index(["score", "given"])
    assert nested.loc[("arc acc", "other_tasks_mean"), "without_r2"] > 0.9
    assert nested.loc[("arc acc", "other_tasks_component"), "without_r2"] > 0.9
    rivals = set(findings.tables["comparisons"]["other"])
    assert {"other_tasks_mean", "other_tasks_component"} <= rivals
    mean = findings.observations.frame.query("task == 'mean'")
    assert mean[["other_tasks_mean", "other_tasks_component"]].isna().all(axis=None)


def test_a_predictor_that_says_more_of_one_task_is_told_with_it(tmp_path):
    findings = models(tmp_path, share_of_arc=1)
    (sentence,) = [words for words in findings.words if words.startswith("Scores of the other")]
    assert "coupling@10 adds something to what the other tasks say of " in sentence
    assert "(arc acc" in sentence
    nested = findings.tables["nested"].set_index(["score", "given"])
    assert nested.loc[("arc acc", "other_tasks_mean"), "partial_coefficient"] > 0.7
