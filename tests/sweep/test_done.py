"""Tasks are done if complete results of these settings and weights lie there, and not else."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in import STAND_IN

from lm_eval_coupling.sweep.done import done
from lm_eval_coupling.sweep.request import configuration
from lm_eval_coupling.sweep.units import Task
from lm_eval_coupling.sweep.work import Worker


def finished(plan):
    assert Worker(plan, command=STAND_IN).run(plan.units[0]).state == "done"
    return done(plan, plan.units[0])


def missing(plan):
    return [task.name for task in done(plan, plan.units[0]).missing]


def test_nothing_then_everything(folder_of, make_plan):
    plan = make_plan([folder_of("a")])
    assert missing(plan) == ["one", "two"]
    assert finished(plan).complete and done(plan, plan.units[0]).measured == 8


def test_the_state_file_has_no_say(folder_of, make_plan):
    plan = make_plan([folder_of("a")])
    finished(plan)
    folder = plan.folder(plan.units[0])
    (folder / "state.json").unlink()
    assert done(plan, plan.units[0]).complete
    (folder / "state.json").write_text('{"state": "done"}')
    for file in folder.glob("*/results_*.json"):
        file.unlink()
    assert missing(plan) == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "remain"),
    [
        ({"tasks": ["one"]}, []),
        ({"tasks": ["two", "one", "three"]}, ["three"]),
        ({"tasks": ["one", {"task": "two", "num_fewshot": 3}]}, ["two"]),
        ({"lm_eval": {"batch_size": 2, "device": "cpu", "verbosity": "INFO"}}, []),
        ({"coupling": {"limit": 4, "store": "/tmp/x"}}, []),
        ({"coupling": {"limit": 5}}, ["one", "two"]),
        ({"lm_eval": {"limit": 3}}, ["one", "two"]),
        ({"run": {"on": "slurm", "hours": 1}}, []),
    ],
)
def test_a_changed_plan_needs_what_is_new(folder_of, make_plan, changes, remain):
    model = folder_of("a")
    finished(make_plan([model]))
    assert missing(make_plan([model], **changes)) == remain


def test_facts_are_no_reason_to_run_again(folder_of, make_plan):
    model = folder_of("a")
    finished(make_plan([model]))
    assert missing(make_plan([{"model": model, "facts": {"family": "x"}}])) == []


def test_changed_weights_are_another_model(folder_of, make_plan):
    """A model trained on in place keeps its name: its old results are not its results."""
    model = folder_of("a")
    plan = make_plan([model])
    finished(plan)
    weights = Path(model) / "model.safetensors"
    weights.write_text("trained on")
    assert missing(plan) == ["one", "two"]
    assert "files have changed" in done(plan, plan.units[0]).why


def test_a_copied_folder_with_its_times_is_the_same_model(folder_of, make_plan):
    model = folder_of("a")
    plan = make_plan([model])
    finished(plan)
    weights = Path(model) / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_text(weights.read_text())
    os.utime(weights, ns=times)
    assert missing(plan) == []


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ({"coupling": {"interrupted": True}}, "interrupted"),
        ({"coupling": {"measured": 0, "failed": 8}}, "none of 8 documents"),
        ({"leave_out": ["coupling_"]}, "not all tables"),
        ({"leave_out": ["samples_two"]}, "samples of two"),
        ({"leave_out": ["results_"]}, "left no complete results"),
    ],
)
def test_incomplete_results_do_not_count(folder_of, make_plan, behaviour, why):
    """lm-eval writes results before tables and samples, and after an interruption too."""
    plan = make_plan([folder_of("a", **behaviour)])
    outcome = Worker(plan, command=STAND_IN).run(plan.units[0])
    assert outcome.state == "failed" and why in outcome.reason
    assert missing(plan) == ["one", "two"]


@pytest.mark.parametrize("cut", ["samples_two*", "results_*"])
def test_files_cut_short_do_not_count(folder_of, make_plan, cut):
    plan = make_plan([folder_of("a")])
    finished(plan)
    (file,) = plan.folder(plan.units[0]).glob(f"*/{cut}")
    file.write_text(file.read_text()[:-4])
    assert missing(plan) == ["one", "two"]
    assert finished(plan).complete
    assert [
        f.name
        for f in plan.folder(plan.units[0]).glob("*/*.superseded")
        if f.name.startswith("results_")
    ]


def test_only_scores_need_no_coupling(folder_of, make_plan):
    plan = make_plan([folder_of("a", coupling={"measured": 0})], coupling={"limit": 0})
    assert "coupling_store" not in configuration(plan, plan.units[0], plan.tasks)["model_args"]
    assert finished(plan).complete


def test_results_of_other_weights_in_one_folder_are_not_mixed(folder_of, make_plan):
    """Unknown files are told apart by the fingerprints in the results; the newest counts."""
    plan = make_plan([folder_of("a")])
    finished(plan)
    (file,) = plan.folder(plan.units[0]).glob("*/results_*.json")
    old = json.loads(file.read_text())
    old["config"]["coupling"]["fingerprint"] = "of others"
    file.write_text(json.dumps(old))
    more = replace(plan, tasks=(*plan.tasks, Task("three")))
    assert (
        Worker(more, command=STAND_IN).run(more.units[0]).state == "failed"
    )  # what it made is of other weights than the rest
    assert missing(more) == ["one", "two"]
    assert Worker(more, command=STAND_IN).run(more.units[0]).state == "done"


def test_superseded_results_are_out_of_sight_and_not_lost(folder_of, make_plan):
    """Readers of the folder would refuse two settings, or count changed weights as two models."""
    model = folder_of("a")
    finished(make_plan([model]))
    plan = make_plan([model], coupling={"limit": 5})
    finished(plan)
    folder = plan.folder(plan.units[0])
    assert (
        len(list(folder.glob("*/results_*.json"))) == 1
        and len(list(folder.glob("*/coupling_*.parquet"))) == 2
    )
    assert len(list(folder.glob("*/*.superseded"))) == 5


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"table", None])
def test_a_table_that_was_emptied_or_damaged_does_not_count(folder_of, make_plan, content):
    """On a full disk lm-eval ended well and left tables of nothing; `--check` said done."""
    plan = make_plan([folder_of("a")])
    finished(plan)
    (table,) = plan.folder(plan.units[0]).glob("*/coupling_two_*")
    table.write_bytes(table.read_bytes()[:-20] if content is None else content)
    assert missing(plan) == ["one", "two"]
    assert "is empty or damaged" in done(plan, plan.units[0]).why
    assert finished(plan).complete


def test_a_table_without_rows_does_not_count(folder_of, make_plan):
    import pyarrow
    import pyarrow.parquet

    plan = make_plan([folder_of("a")])
    finished(plan)
    (table,) = plan.folder(plan.units[0]).glob("*/coupling_two_*")
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int8())}), table)
    assert missing(plan) == ["one", "two"]


@pytest.mark.parametrize(
    ("counts", "limit", "lines", "complete"),
    [
        ({"original": 8, "effective": 5}, None, 8, True),  # three that the task cannot score
        ({"original": 8, "effective": 5}, None, 16, True),  # two filters
        ({"original": 8, "effective": 5}, None, 7, False),
        ({"original": 8, "effective": 0}, None, 8, True),
        ({"original": 100, "effective": 5}, 8, 8, True),
        ({"original": 100, "effective": 5}, 0.075, 8, True),
        ({"original": 100, "effective": 8}, 8, 7, False),
        ({"original": 8, "effective": 8}, None, 12, False),
        ({"original": 8, "effective": 8}, None, 4, False),
    ],
)
def test_documents_that_their_task_cannot_score_have_samples(
    folder_of, make_plan, counts, limit, lines, complete
):
    """Such a unit was never done: lm-eval counts scores, and writes a line for each document."""
    plan = make_plan([folder_of("a")], tasks=["one"], lm_eval={"limit": limit} if limit else {})
    finished(plan)
    folder = plan.folder(plan.units[0])
    (results,) = folder.glob("*/results_*")
    (samples,) = folder.glob("*/samples_*")
    run = json.loads(results.read_text())
    run["n-samples"] = {"one": counts}
    results.write_text(json.dumps(run))
    samples.write_text("{}\n" * lines)
    assert (missing(plan) == []) is complete


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3},
        {"config": {"coupling": []}},
        {"configs": None},
        {"configs": {"one": 3}},
        {"configs": {"one": {"metadata": {"coupling_sweep": {"tasks": 3}}}}},
        {"total_evaluation_time_seconds": "soon"},
        None,
    ],
)
def test_results_of_another_shape_are_passed_over(folder_of, make_plan, change):
    plan = make_plan([folder_of("a")])
    finished(plan)
    (results,) = plan.folder(plan.units[0]).glob("*/results_*")
    if change is None:
        results.write_text("[" * 10**6)
    else:
        results.write_text(json.dumps(json.loads(results.read_text()) | change))
    (results.parent / "results_2020.json").mkdir()
    (results.parent / "results_2021.json").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(results.parent / "results_2022.json")
    assert done(plan, plan.units[0]).complete is (
        change == {"total_evaluation_time_seconds": "soon"}
    )
    assert finished(plan).complete
