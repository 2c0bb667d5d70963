"""What lm-eval or we would refuse of a plan, found before any work and without loading a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from forked import forked_python
from lean_lm_eval import lean_lm_eval

lm_eval = pytest.importorskip("lm_eval")

from lm_eval_coupling.harness import preflight, preflight_models  # noqa: E402
from lm_eval_coupling.sweep import checks  # noqa: E402
from lm_eval_coupling.sweep import plan as plans  # noqa: E402

GROUP = "group: tiny_both\ntask: [tiny_choice, tiny_blimp]\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    tiny.save_model(folder / "model")
    for kind in ("choice", "blimp"):
        tiny.save_task(folder / "tasks", kind)
    (folder / "tasks" / "both.yaml").write_text(GROUP)
    tagged = (
        (folder / "tasks" / "tiny_choice.yaml")
        .read_text()
        .replace("task: tiny_choice", "task: tiny_tagged\ntag: tiny_tag")
    )
    (folder / "tasks" / "tagged.yaml").write_text(tagged)
    return folder


@pytest.fixture(scope="module")
def manager(home):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(home / "tasks"), include_defaults=False)


def look(model, arguments=None, coupling=None, revisions=("main",), offline=True):
    asked = [{"model": str(model), "arguments": arguments or {}, "revisions": list(revisions)}]
    return preflight_models.check(asked, coupling or {"ranks": "2+4"}, offline=offline)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["tiny_choise"], "did you mean tiny_choice?"),
        (["tiny_both", "tiny_choice"], "tiny_choice twice, in tiny_both and in tiny_choice"),
        (["nowhere.yaml"], "which is no file"),
    ],
)
def test_tasks_that_lm_eval_would_refuse(manager, names, part):
    assert part in "\n".join(preflight._tasks(manager, names))


def test_tasks_groups_tags_and_patterns_that_are_there(manager):
    assert not [*preflight._tasks(manager, ["tiny_both", "tiny_tag"])]
    assert not [*preflight._tasks(manager, ["tiny_*lim*", "tiny_tagged"])]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"limt": 3}, "lm_eval.limt, which lm-eval does not know; did you mean limit?"),
        ({"fewshot_as_multiturn": True}, "apply_chat_template"),
        ({"seed": [1, 2]}, "seed expects"),
    ],
)
def test_options_that_lm_eval_would_refuse(given, part):
    assert part in "\n".join(preflight._lm_eval(given))


def test_options_that_are_right():
    given = {
        "limit": 0.5,
        "batch_size": "auto:4",
        "log_samples": True,
        "gen_kwargs": "temperature=0",
    }
    assert not [*preflight._lm_eval(given)]


def test_facts_of_a_model_without_its_weights(home):
    facts, problems = look(home / "model")
    model = lm_eval_model(home / "model")
    parameters = sum(t.numel() for t in model.parameters())
    assert not problems
    assert facts == {
        str(home / "model"): {
            "d_model": 32,
            "n_layers": 2,
            "n_params": parameters,
            "vocab_size": model.config.vocab_size,
            "dtype": "float32",
        }
    }


def lm_eval_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "coupling", "part"),
    [
        ({"dtpye": "float32"}, {}, "argument dtpye of"),
        ({"coupling_rnks": 3}, {}, "did you mean coupling_ranks?"),
        ({"dtype": "flot32"}, {}, "did you mean float32?"),
        ({"tp_plan": "auto"}, {}, "splits every weight over processes"),
        ({"trust_remote_code": "no"}, {}, "trust_remote_code='no' of"),
        ({"max_length": -5}, {}, "expected a whole number of 1 or more"),
        ({"max_length": "2048"}, {}, "expected a whole number of 1 or more"),
        ({"prefix_token_id": -1}, {}, "expected a whole number of 0 or more"),
        ({"gguf_file": "no.gguf"}, {}, "a folder without such a file"),
        ({}, {"ranks": "400"}, "32"),
    ],
)
def test_arguments_that_would_be_refused(home, arguments, coupling, part):
    assert part in "\n".join(look(home / "model", arguments, coupling)[1])


def test_the_first_token_may_be_the_prefix(home):
    assert not look(home / "model", {"prefix_token_id": 0})[1]


def test_models_that_are_not_there(home, tmp_path):
    (tmp_path / "empty").mkdir()
    (told,) = look(tmp_path / "empty")[1]  # once
    assert "without config.json" in told
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "without weights" in look(tmp_path / "empty")[1][0]
    assert "no folder here" in look(tmp_path / "nowhere")[1][0]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    (tmp_path / "odd" / "model.safetensors").write_text("")
    assert "transformers cannot load" in look(tmp_path / "odd")[1][0]
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "t5"}')
    assert "encoder-decoder" in look(tmp_path / "odd")[1][0]


def test_a_folder_has_no_revisions(home):
    """transformers takes no notice of them: the same weights were measured as checkpoints of a
    training.
    """
    assert not look(home / "model")[1]
    (found,) = look(home / "model", revisions=["main", "step1"])[1]
    assert not look(home / "model", {"peft": "some/adapter"}, revisions=["step1"])[1]
    assert (
        f"got revision step1 of the folder {home / 'model'}, where transformers looks for none"
        in found
    )


def test_models_of_the_hub(monkeypatch, tmp_path):
    """Off line what is not in the cache cannot be had; on line each revision must be one that the
    model has.
    """
    import types

    import huggingface_hub

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "--download first" in look("some/model", revisions=["step1", "step2"])[1][0]
    refs = types.SimpleNamespace(
        branches=[types.SimpleNamespace(name=n) for n in ("main", "step1000")], tags=[]
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", lambda self, model: refs)
    found = look("some/model", revisions=["step1000", "step100"], offline=False)[1]
    assert (
        len(found) == 1
        and "step100 of some/model" in found[0]
        and "did you mean step1000?" in found[0]
    )

    def unknown(self, model):
        raise OSError("404 Client Error\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", unknown)
    assert (
        "cannot be looked up: 404 Client Error"
        in look("some/model", revisions=["x"], offline=False)[1][0]
    )


def test_only_what_transformers_loads_is_downloaded():
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "original/x.pth",
        "consolidated.safetensors",
        "tf.h5",
    ]
    assert preflight_models.needed(names) == ["config.json", "model.safetensors"]
    assert preflight_models.needed(["config.json", "pytorch_model.bin"]) == [
        "config.json",
        "pytorch_model.bin",
    ]


def test_downloads_go_on_after_a_failure(monkeypatch, tmp_path, capsys):
    import huggingface_hub

    fetched = []

    def fetch(model, revision, allow_patterns):
        if revision == "gone":
            raise OSError("404")
        fetched.append((model, revision, allow_patterns))

    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda self, model, revision: ["config.json", "a.bin"],
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    models = [
        {"model": "a/b", "revisions": ["gone", "main"]},
        {"model": str(tmp_path), "revisions": ["main"]},
    ]
    assert ["a/b at gone" in problem for problem in preflight_models.download(models)] == [True]
    assert fetched == [("a/b", "main", ["config.json", "a.bin"])]


def test_overridden_tasks_are_those_that_lm_eval_runs(manager, home, tmp_path):
    """Groups hand the number down; a task's tag must not come to stand for that task alone."""
    from lm_eval.tasks import TaskManager

    preflight._override(manager, {"tiny_both": 2, "tiny_tag": 1}, tmp_path)
    after = TaskManager(include_path=[str(home / "tasks"), str(tmp_path)], include_defaults=False)
    loaded = after.load(["tiny_both", "tiny_tag"])
    shots = {name: task.config.num_fewshot for name, task in loaded["tasks"].items()}
    assert shots == {"tiny_choice": 2, "tiny_blimp": 2, "tiny_tagged": 1}
    assert after.task_index["tiny_tag"].tags == {"tiny_tagged"}


def test_data_that_cannot_be_fetched_is_told(home, manager):
    asked = {"tasks": [["tiny_choice", None], ["tiny_lost", None]], "models": []}
    assert not [*preflight._download(manager, {**asked, "tasks": asked["tasks"][:1]})]
    lost = (
        (home / "tasks" / "tiny_choice.yaml")
        .read_text()
        .replace("tiny_choice", "tiny_lost")
        .replace("choice.jsonl", "no.jsonl")
    )
    (home / "lost").mkdir()
    (home / "lost" / "lost.yaml").write_text(lost)
    from lm_eval.tasks import TaskManager

    further = TaskManager(
        include_path=[str(home / "tasks"), str(home / "lost")], include_defaults=False
    )
    (problem,) = preflight._download(further, asked)
    assert "got the task tiny_lost, whose data cannot be fetched" in problem


@pytest.mark.slow
def test_a_whole_plan_is_checked_in_a_process_of_its_own(home, tmp_path, monkeypatch):
    plan = {
        "models": [str(home / "model")],
        "tasks": ["arc_easy", {"task": "tiny_choice", "num_fewshot": 2}],
        "coupling": {"ranks": "2+4"},
        "lm_eval": {"include_path": str(home / "tasks")},
        "output": str(tmp_path / "out"),
        "run": {"environment": {"HF_HUB_OFFLINE": "1"}},
    }
    monkeypatch.setenv("PYTHONPATH", lean_lm_eval(), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", forked_python())
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(plan))
    assert checks.check(plans.read(file))[str(home / "model")]["n_layers"] == 2
    with monkeypatch.context() as patch:  # what was found right is not looked at again
        patch.setattr(
            subprocess, "run", lambda *words, **options: pytest.fail("it was asked again")
        )
        assert checks.check(plans.read(file))[str(home / "model")]["n_layers"] == 2
    (override,) = (tmp_path / "out" / "tasks").glob("*.yaml")
    assert yaml.safe_load(override.read_text())["num_fewshot"] == 2
    file.write_text(
        json.dumps(
            plan
            | {"models": [str(Path(tmp_path) / "no")], "tasks": ["arc_esy"], "output": "/proc/no"}
        )
    )
    with pytest.raises(plans.PlanError) as error:
        checks.check(plans.read(file))
    assert [
        any(part in p for p in error.value.problems)
        for part in ("/proc/no", "arc_easy?", "no folder here")
    ] == [True] * 3
