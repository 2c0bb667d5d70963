"""Coupling beside its rivals.

Loss, other numbers of the inside, noise of the documents, other tasks and output types.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
from saved_runs import DATE, record, sample, save, task_summary, write_samples

from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.fit.losses import gold_answers, right_choice
from lm_eval_coupling.saved.samples import read_answers

QUICK = 199


def save_model(
    folder,
    name,
    coupling,
    score,
    *,
    tasks=("arc",),
    types=None,
    rows=(),
    losses=None,
    change=None,
    **about,
):
    """A run of known coupling@10 and accuracy; ``losses``.

    −log p of the right answer of each document, in nats per byte.
    """
    summaries = {task: task_summary(coupling + 0.01) for task in tasks}
    where = save(folder, summaries, model=name, rows=rows, fingerprint=name, run_id=name, **about)
    file = where / f"results_{DATE}.json"
    run = json.loads(file.read_text())
    for task in tasks:
        run["results"][task] |= {
            "acc,none": score,
            "acc_stderr,none": math.sqrt(score * (1 - score) / 49),
        }
    run["configs"] = {
        task: {"output_type": (types or {}).get(task, "multiple_choice")} for task in tasks
    }
    if change:
        change(run)
    file.write_text(json.dumps(run))
    for task in tasks if losses is not None else ():
        given = [[[str(-loss * len(" blue")), "False"]] for loss in losses]
        lines = [
            sample(f"d{i}", filtered_resps=[["-30", "False"], *right])
            for i, right in enumerate(given)
        ]
        write_samples(where, task, lines)
    return where


def test_loss_of_the_right_answer_by_hand(tmp_path):
    lines = [
        sample(
            "a", filtered_resps=[["-1.5", "False"], ["-2.5", "False"]]
        ),  # " blue" is right: 5 bytes
        sample("b", filtered_resps=[["-3", "False"], ["-1", "False"]], acc=1.0),
        sample("c", target="green"),
    ]
    answers = read_answers(write_samples(tmp_path, "arc", lines), "acc,none")
    # The third is not among the choices; as its answer " red" was wrong, the other one is right.
    assert list(gold_answers(answers)) == [
        pytest.approx(v) for v in ((0.5, -1.0), (0.2, 2.0), (0.5, -1.0))
    ]
    assert right_choice([("x", -1.0), ("x", -2.0)], "x", None) is None
    assert (
        right_choice([("Ann", -1.0), ("Bob", -2.0)], "was late", True) == 0
    )  # as Winogrande tells it
    assert right_choice([("Ann", -1.0), ("Bob", -2.0)], "was late", False) == 1


def test_losses_are_over_the_documents_that_all_models_answered(tmp_path):
    """Lines cut out of one model's samples changed its loss to that over easier documents."""
    losses = np.linspace(0.1, 1.0, 10)
    for number in range(4):
        kept = losses if number else losses[:6]
        save_model(tmp_path, f"m{number}", 0.2 + number / 50, 0.5 + number / 50, losses=kept)
    save_model(tmp_path, "m4", 0.35, 0.6, losses=losses[:1])
    found = fit_runs(tmp_path, resamples=QUICK)
    rows = found.observations.frame.set_index("label")
    assert rows["gold_answer_loss"].dropna().tolist() == pytest.approx([losses[:6].mean()] * 4)
    assert rows["gold_answer_n"].dropna().tolist() == [6] * 4 and "m4" in rows.index
    assert (
        "losses of the right answers of arc are over the 6 documents that 4 of 5 runs have in "
        "common, of up to 10" in found.notes
    )


def test_what_coupling_says_beyond_loss(tmp_path):
    """The score is made of the loss; coupling follows the loss and says nothing of its own."""
    rng = np.random.default_rng(0)
    for i in range(14):
        loss = rng.uniform(0.2, 1.2)
        coupling = 0.5 - 0.2 * loss + rng.normal(0, 0.03)
        save_model(
            tmp_path, f"m{i}", coupling, 0.9 - 0.4 * loss, losses=loss + rng.normal(0, 0.01, 30)
        )
    found = fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK)
    nested = found.tables["nested"].set_index("given")
    assert (
        nested.loc["gold_answer_loss", "p"] > 0.01
        and nested.loc["gold_answer_loss", "without_r2"] > 0.99
    )
    rival = found.tables["comparisons"].set_index("other").loc["gold_answer_loss"]
    assert -rival["second"] > rival["first"] > 0 and rival["p_holm"] < 0.05
    # The margin is the loss in other units, and counts once.
    assert "Beside 1 rival, strengths compared" in " ".join(found.words)
    assert "more strongly than 0 and" in " ".join(found.words)
    alone = found.tables["alone"].set_index("predictor")
    assert alone.loc["gold_answer_loss", "r2_left_out"] > alone.loc["coupling@10", "r2_left_out"]


def test_compute_is_held_fixed_where_it_is_known(tmp_path):
    rng = np.random.default_rng(1)
    facts = ["model,training_tokens"]
    for i in range(12):
        size, tokens = 10 ** rng.uniform(8, 10), 10 ** rng.uniform(10, 12)
        facts.append(f"m{i},{tokens}")
        save_model(
            tmp_path,
            f"m{i}",
            rng.uniform(0.1, 0.4),
            0.05 * np.log10(6 * size * tokens) - 0.5,
            n_params=size,
        )
    (tmp_path / "facts.csv").write_text("\n".join(facts))
    found = fit_runs(tmp_path, x=["coupling@10"], facts=tmp_path / "facts.csv", resamples=QUICK)
    assert found.tables["nested"].set_index("given").loc[
        "log10_compute", "without_r2"
    ] == pytest.approx(1, abs=1e-6)


def test_reliability_of_documents_and_correlation_without_noise(tmp_path):
    """Models whose true coupling differs by 0.05, documents with noise of 0.1.

    A reliability of 0.9 takes 36 of them.
    """
    rng = np.random.default_rng(2)
    for i in range(12):
        true = 0.3 + rng.normal(0, 0.05)
        values = true + rng.normal(0, 0.1, 36)
        rows = [record("arc", d) for d in range(36)]
        for row, value in zip(rows, values, strict=True):
            row["normalized_miscoupling"] = np.full_like(row["normalized_miscoupling"], 1 - value)
        where = save_model(tmp_path, f"m{i}", values.mean(), 0.2 + true, rows=rows)
        right = rng.uniform(size=36) < 0.2 + true
        write_samples(where, "arc", [sample(f"d{d}", acc=float(r)) for d, r in enumerate(right)])
    found = fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK)
    reliable = found.tables["reliability"].set_index("predictor").loc["coupling@10"]
    assert (
        reliable["low"] < 0.9 < reliable["high"]
        and reliable["documents"] == 36
        and reliable["models"] == 12
    )
    assert "Reliability of coupling@10 over documents" in " ".join(found.words)
    corrected = found.tables["corrected"].set_index("predictor").loc["coupling@10"]
    assert corrected["reliability_x"] == pytest.approx(reliable["alpha"])


def test_coupling_of_other_tasks_and_output_types(tmp_path):
    """Coupling of `arc` goes with the score of `arc`, that of `gsm` with nothing; a mean is told
    for each output type.
    """
    rng = np.random.default_rng(3)
    types = {
        "arc": "multiple_choice",
        "hella": "multiple_choice",
        "gsm": "generate_until",
        "math": "generate_until",
    }
    for i in range(10):
        coupling, other = rng.uniform(0.1, 0.4, 2)

        def change(run, coupling=coupling, noise=other):
            for k in ("10", "30"):
                run["config"]["coupling"]["tasks"]["gsm"]["measures"]["coupling"][k]["mean"] = noise
            run["results"]["arc"]["acc,none"] = 2 * coupling

        save_model(tmp_path, f"m{i}", coupling, 0.5, tasks=tuple(types), types=types, change=change)
    found = fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK)
    swapped = found.tables["swapped_tasks"].set_index(["score", "measured_on"])["coefficient"]
    assert swapped["arc acc", "hella"] == pytest.approx(1) and abs(swapped["arc acc", "gsm"]) < 0.8
    assert found.observations.scores[-3:] == [
        "mean of 2 log-likelihood scores",
        "mean of 2 generation scores",
        "mean of 4 scores",
    ]
    assert "measured on another task's by" in " ".join(found.words)


def test_all_predictors_and_ranks_are_adjusted_for_at_once(tmp_path):
    rng = np.random.default_rng(4)
    for i in range(10):
        size = 10 ** rng.uniform(8, 10)
        save_model(tmp_path, f"m{i}", rng.uniform(0.1, 0.4), 0.3 + 0.04 * i, n_params=size)
    found = fit_runs(tmp_path, resamples=QUICK)
    rows = found.tables["correlations"].query("method == 'pearson'").dropna(subset="p_simultaneous")
    assert (rows["p_simultaneous"] >= rows["p"] - 0.15).all()  # both are of few permutations
    assert "permutations that adjust for all at once" in " ".join(found.words)


def test_a_rival_that_some_runs_lack_is_left_to_those_that_have_it(tmp_path):
    rng = np.random.default_rng(5)
    for i in range(10):
        losses = rng.uniform(0.2, 1, 20) if i else None
        save_model(tmp_path, f"m{i}", rng.uniform(0.1, 0.4), 0.3 + 0.04 * i, losses=losses)
    found = fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK)
    rival = found.tables["comparisons"].set_index("other").loc["gold_answer_loss"]
    assert rival["n"] == 9 and rival["dropped"] == 1
    assert "gold_answer_loss" not in set(found.tables["nested"].get("given", pd.Series(dtype=str)))


def test_losses_that_no_probability_has_are_named_and_left_out(tmp_path):
    rng = np.random.default_rng(6)
    for i in range(4):

        def change(run, value=1.0 if i else -0.5):
            run["results"]["wiki"] |= {"bits_per_byte,none": value}

        losses = rng.uniform(0.2, 1, 20)
        losses[3] *= 1 if i else -1
        tasks = ("arc", "wiki")
        save_model(tmp_path, f"m{i}", 0.2, 0.3, tasks=tasks, losses=losses, change=change)
    found = fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK)
    notes = "\n".join(found.notes)
    assert notes.count("of document 'd3', expected at most 0; 1 such lines are left out") == 2
    assert "with -0.5 bits per byte of wiki, expected a finite number from 0 on" in notes
    frame = found.observations.frame.query("task == 'arc'").set_index("model")
    assert frame["gold_answer_n"].tolist() == [19] * 4
    assert frame["bits_per_byte"].isna().tolist() == [True, False, False, False]
