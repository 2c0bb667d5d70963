"""Sweeps that measure their models from the samples that other machines wrote."""

import json
import shutil

import pytest
import tiny
import yaml
from evaluations import written
from forked import forked_python
from test_measure_samples import equal_records, evaluate, measure

from lm_eval_coupling import load_records
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.sweep import checks, command, work
from lm_eval_coupling.sweep.command import survey
from lm_eval_coupling.sweep.plan import PlanError, read

plugin.install()  # The start-up hook is off in tests.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models and two tasks; their evaluations lie in one folder, as a sweep leaves them."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "model")
    tiny.save_model(folder / "other", num_hidden_layers=2)
    for kind in ("choice", "generate"):
        tiny.save_task(folder / "tasks", kind)
    for model in ("model", "other"):
        arguments = {"pretrained": str(folder / model)}
        evaluate(folder, folder / "scored", "hf", ["tiny_choice"], arguments)
    evaluate(folder, folder / "scored", "hf", ["tiny_generate"])
    return folder


def plan_of(home, tmp_path, models=("model", "other"), **changes):
    content = {
        "models": [str(home / name) if name in ("model", "other") else name for name in models],
        "samples": str(home / "scored"),
        "coupling": {"ranks": "2+4", "limit": 5},
        "lm_eval": {"device": "cpu"},
        "output": str(tmp_path / "out"),
        "run": {"environment": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}},
    }
    content |= changes
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return file


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the check, which loads lm-eval's index of tasks and has tests of its own.

    Units are measured by an interpreter that starts at once.
    """
    monkeypatch.setattr(checks, "check", lambda plan, **options: {})
    monkeypatch.setattr(work, "_MEASURE", (forked_python(), *work._MEASURE[1:]))


def test_values_are_those_of_measuring_by_hand(home, tmp_path, unchecked, capsys):
    """To the last bit; the same plan again does nothing, and a new evaluation what is new."""
    file = plan_of(home, tmp_path)
    assert command.sweep(file, check=True) == 1
    assert "model is missing" in capsys.readouterr().out
    assert command.sweep(file) == 0, capsys.readouterr().out
    plan = read(file)
    for model, tasks in (("model", {"tiny_choice", "tiny_generate"}), ("other", {"tiny_choice"})):
        own = tmp_path / f"by-hand-{model}"
        measure(home, home / "scored", own, model=model)
        (unit,) = [unit for unit in plan.units if unit.model.endswith(model)]
        swept = load_records(plan.folder(unit))
        assert set(swept["task"]) == tasks
        equal_records(load_records(own), swept)
    before = sorted(plan.output.rglob("*.json*"))
    assert command.sweep(file) == 0
    assert sorted(plan.output.rglob("results_*")) == [f for f in before if "results_" in f.name]
    # One evaluation is scored again: its samples have changed, the others' have not.
    of_other = next(f for f in (home / "scored").rglob("results_*.json") if "other" in str(f))
    text = of_other.read_text()
    of_other.write_text(text + "\n")
    try:
        states = {s.unit.label: s for s in survey(read(file))}
        assert [states[name].state == "done" for name in sorted(states)] == [True, False]
        assert "the samples have changed since" in [*states.values()][-1].detail
    finally:
        of_other.write_text(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": "/nowhere"}, "got samples: /nowhere, expected a results_.*json of lm-eval or"),
        ({"tasks": ["arc_easy"]}, "got tasks beside samples, .* leave out one of them"),
        ({"samples": None}, "got no tasks, expected a list of tasks, or samples of evaluations"),
        ({"samples": 3}, "got samples: 3, expected a folder"),
        (
            {"models": ["org/third"]},
            r"got samples: .* with evaluations of .*model, .*other, expected one of org/third",
        ),
        (
            {"models": [{"model": "model", "revisions": ["step1"]}]},
            "expected one of model at revision step1",
        ),
        ({"lm_eval": {"limit": 5}}, "got lm_eval.limit beside samples, which are scored already"),
        ({"coupling": {"limit": 0}}, "got coupling.limit: 0 beside samples, expected a number of"),
    ],
)
def test_what_is_wrong_is_a_sentence_at_check_already(home, tmp_path, changes, message):
    with pytest.raises(PlanError, match=message) as error:
        command.sweep(plan_of(home, tmp_path, **changes), check=True)
    assert len(error.value.problems) == 1


def test_an_output_inside_the_samples_is_refused(home, tmp_path):
    file = plan_of(home, tmp_path, output=str(home / "scored" / "out"))
    with pytest.raises(PlanError, match="got output: .* inside samples: .* outside of it"):
        command.sweep(file, check=True)


def test_evaluations_without_samples_or_of_one_task_twice_are_refused(home, tmp_path):
    folder = tmp_path / "scored"
    shutil.copytree(home / "scored", folder)
    kept = [file for file in folder.rglob("results_*.json") if "other" in str(file)]
    for file in folder.rglob("samples_*.jsonl"):
        if "other" not in str(file):
            file.unlink()
    with pytest.raises(PlanError, match="without samples_.*jsonl beside it; run lm_eval again"):
        read(plan_of(home, tmp_path, ["model"], samples=str(folder)))
    shutil.copytree(kept[0].parent, folder / "again")
    with pytest.raises(PlanError, match="that share the task tiny_choice, expected one of each"):
        read(plan_of(home, tmp_path, ["other"], samples=str(folder)))


def test_what_a_sweep_left_is_a_source(home, tmp_path, unchecked):
    """Its results carry the note of that sweep, which says nothing of the new one."""
    first = plan_of(home, tmp_path, ["other"])
    assert command.sweep(first) == 0
    again = tmp_path / "again"
    again.mkdir()
    file = plan_of(home, again, ["other"], samples=str(read(first).output))
    assert [status.state for status in survey(read(file))] == ["missing"]
    assert command.sweep(file) == 0
    assert [status.state for status in survey(read(file))] == ["done"]
    results = written(read(file).output)
    assert results["config"]["coupling"]["samples_of"]["model"].endswith("other")
    asked = results["configs"]["tiny_choice"]["metadata"]["coupling_sweep"]
    assert json.dumps(asked["asked"]).find("coupling") > 0


def test_a_request_by_hand_repeats_a_unit(home, tmp_path, unchecked, capsys):
    from lm_eval_coupling import cli

    file = plan_of(home, tmp_path, ["other"])
    assert command.sweep(file) == 0
    (request,) = read(file).output.rglob("measure.yaml")
    assert cli.main(["measure", "--config", str(request)]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    (tmp_path / "bad.yaml").write_text("a: 1")
    assert cli.main(["measure", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "expected the measure.yaml of a sweep" in capsys.readouterr().err


def test_another_model_of_that_name_fails_with_its_difference(home, tmp_path, unchecked, capsys):
    models = [{"model": str(home / "other"), "args": {"dtype": "bfloat16"}}]
    assert command.sweep(plan_of(home, tmp_path, models=models)) == 1
    assert "differ in dtype (evaluated float32, loaded bfloat16)" in capsys.readouterr().out
