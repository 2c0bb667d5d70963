"""Numbers of models that are compared are over the same parts: tasks of a group, documents, texts.

A mean over fewer parts is another number, and differs between models that do not.
"""

import math

import pytest
from fitted_runs import observations, save_model

from lm_eval_coupling import load_runs
from lm_eval_coupling.fit.findings import fit_runs

COUPLING = {"easy": 0.2, "hard": 0.6}


def save_group(folder, number, measured=("easy", "hard")):
    """Save a run of a group whose tasks have couplings of their own, the same in every model."""

    def add_group(run):
        run["group_subtasks"] = {"both": ["easy", "hard"]}
        run["results"]["both"] = {"acc,none": 0.3 + number / 50, "acc_stderr,none": 0.01}
        summaries = run["config"]["coupling"]["tasks"]
        for task in COUPLING:
            for values in summaries[task]["measures"]["coupling"].values():
                values["mean"] = COUPLING[task]
            if task not in measured:
                del summaries[task]

    save_model(folder, f"m{number}", 0.1, dict.fromkeys(COUPLING, 0.5), change=add_group)


@pytest.mark.parametrize("fewer", [range(4, 8), range(1, 8)])
def test_a_group_measured_on_other_tasks_has_no_coupling(tmp_path, fewer):
    """Half of the models had 0.2 and half 0.4: coupling went with the score, p = 0.02."""
    for number in range(8):
        save_group(tmp_path, number, ("easy",) if number in fewer else ("easy", "hard"))
    told = observations(tmp_path)
    known = told.frame.dropna(subset="coupling@10")
    assert known["coupling@10"].nunique() == 1 and len(known) == max(len(fewer), 8 - len(fewer))
    assert known["coupling_stderr@10"].notna().all()
    others = [note for note in told.notes if note.startswith("no coupling of m")]
    assert len(others) == 8 - len(known)
    more, less = "it is over easy, hard, that of", "it is over easy, that of other models over easy"
    assert all((more if len(fewer) > 4 else less) in note for note in others)


def test_a_group_has_as_many_documents_as_are_known(tmp_path):
    """Without the number of one task's documents the sum of the others stood in its place."""

    def lose_a_count(run):
        run["group_subtasks"] = {"both": ["easy", "hard"]}
        run["results"]["both"] = {"acc,none": 0.3, "acc_stderr,none": 0.01}
        del run["n-samples"]["hard"]

    save_model(tmp_path, "m", 0.1, dict.fromkeys(COUPLING, 0.5), change=lose_a_count)
    counts = load_runs(tmp_path).set_index("task")["n_samples"]
    assert counts["easy"] == 50 and math.isnan(counts["both"])


def test_bits_per_byte_are_over_the_texts_that_all_models_have(tmp_path):
    """Every second model had a second text, of more bits per byte, in its mean."""

    def make_texts(run):
        for task, bits in (("wiki", 0.8), ("pile", 1.6)):
            if task in run["results"]:
                del run["results"][task]["acc,none"], run["results"][task]["f1,strict"]
                run["results"][task]["bits_per_byte,none"] = bits
                run["higher_is_better"][task] = {"bits_per_byte": False}

    for number in range(4):
        texts = ["wiki", "pile"] if number % 2 else ["wiki"]
        scores = dict.fromkeys(["arc", *texts], 0.4 + number / 20)
        save_model(tmp_path, f"m{number}", 0.1 + number / 20, scores, change=make_texts)
    told = fit_runs(tmp_path, resamples=49).observations
    of_arc = told.frame[told.frame["task"] == "arc"]
    assert of_arc["bits_per_byte"].tolist() == [0.8] * 4
    assert "bits_per_byte is without pile, which some runs lack" in told.notes
