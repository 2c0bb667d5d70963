"""What cannot be measured costs neither the scores nor what was measured."""

import json
import sqlite3

import pytest
import torch
from evaluations import scores

from lm_eval_coupling import load_records
from lm_eval_coupling.harness import prompts
from lm_eval_coupling.harness.command_line import Command
from lm_eval_coupling.jacobians import levels as jacobians
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.numerics import memory
from lm_eval_coupling.runs.closing import closing_lines


def test_out_of_memory_costs_the_document_not_the_run(evaluate, monkeypatch):
    right = jacobians.closed_jacobians
    longest = len("Question: What colour is the grass?\nAnswer:")  # in bytes, which are tokens

    def scarce(calls, *args):
        if any(call.seq == longest for call in calls):
            raise torch.OutOfMemoryError("no memory")
        return right(calls, *args)

    monkeypatch.setattr(jacobians, "closed_jacobians", scarce)
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    monkeypatch.undo()
    info = found["config"]["coupling"]
    too_long = sum(len(s["arguments"][0][0]) == longest for s in found["samples"]["tiny_choice"])
    assert (info["measured"], info["failed"]) == (8 - too_long, too_long) and 0 < too_long < 8
    assert scores(found) == scores(evaluate("hf", kinds=("choice",)))
    assert sum(s["coupling"] is None for s in found["samples"]["tiny_choice"]) == too_long


def test_weights_that_are_not_finite_keep_their_scores(evaluate, home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "float32")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(home / "float32").save_pretrained(tmp_path / "broken")
    found = evaluate(kinds=("choice",), pretrained=tmp_path / "broken")
    expected = evaluate("hf", kinds=("choice",), pretrained=tmp_path / "broken")
    assert scores(found)[1] == scores(expected)[1]
    info = found["config"]["coupling"]
    assert info["measured"] == 0 and info["failed"] == 2
    assert "block 1 is not finite" in json.dumps(info["tasks"])


def test_a_store_that_cannot_be_written_costs_nothing(evaluate, monkeypatch):
    from lm_eval_coupling.runs.store import MeasurementStore

    def full(self, entries):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(MeasurementStore, "put", full)
    assert evaluate(kinds=("choice",))["config"]["coupling"]["measured"] == 2


@pytest.mark.parametrize("named", [True, False])
def test_a_named_store_that_cannot_be_completed_fails_the_command_at_its_end(
    evaluate, monkeypatch, tmp_path, named
):
    """Tables are complete, and the store of the user's cache is nothing that was asked for."""
    from lm_eval_coupling.runs.store import MeasurementStore

    def full(self, rows):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("lm_eval_coupling.runs.store.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(MeasurementStore, "_write", full)
    command = Command()
    monkeypatch.setattr("lm_eval_coupling.harness.hooks.current_command", lambda: command)
    store = {"coupling_store": str(tmp_path / "store.sqlite") if named else None}
    out = tmp_path / "out"
    info = evaluate(kinds=("choice",), arguments=store | {"coupling_out": str(out)})["config"]
    assert info["coupling"]["measured"] == len(load_records(out)) == 2
    sentence = f"got {tmp_path}/store.sqlite as the store, which could not be completed "
    assert command.problems == ([sentence + "(database or disk is full)"] if named else [])


def test_interrupting_the_measurement_keeps_the_scores(evaluate, monkeypatch):
    right, calls = measure.measure_prompts, []
    monkeypatch.setattr(memory, "PROMPTS", 2)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr("lm_eval_coupling.runs.session.measure_prompts", interrupted)
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    monkeypatch.undo()
    assert scores(found) == scores(evaluate("hf", kinds=("choice",)))
    info = found["config"]["coupling"]
    assert info["interrupted"] and 0 < info["measured"] < 8


@pytest.mark.parametrize("batches", range(1, 8))
def test_a_document_of_which_a_context_is_missing_is_not_measured(evaluate, monkeypatch, batches):
    """After Ctrl-C, a document with one of its two contexts had that one's value."""
    right, calls = measure.measure_prompts, []
    monkeypatch.setattr(memory, "PROMPTS", 1)

    def interrupted(*args):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return right(*args)

    options = {"kinds": ("winogrande",), "limit": 4}
    options["arguments"] = {"coupling_limit": "all", "coupling_measures": "regularity"}
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval_coupling.runs.session.measure_prompts", interrupted)
        partial = evaluate(**options)["config"]["coupling"]
    whole = evaluate(**options)["config"]["coupling"]
    assert partial["interrupted"] and partial["measured"] <= batches // 2
    assert whole["reused"] == batches and not whole["interrupted"]
    rows = {(row.document, row.prompt.index) for row in partial.rows}
    assert all((document, 1 - index) in rows for document, index in rows)
    complete = {row.document for row in partial.rows}
    assert len(complete) == partial["measured"]


def test_an_empty_page_counts_as_one_that_could_not_be_measured(evaluate, home, tmp_path):
    """lm-eval scores it as 0; it was left out of the count without a word."""
    import yaml
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    pages = "".join(json.dumps({"page": page}) + "\n" for page in ("", "One two.", "Three four."))
    (tmp_path / "pages.jsonl").write_text(pages)
    task = {
        "task": "tiny_pages",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "pages.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "output_type": "loglikelihood_rolling",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (tmp_path / "tasks" / "pages.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    out = tmp_path / "out"
    info = evaluate(
        kinds=("pages",),
        arguments={"coupling_limit": "all", "coupling_out": str(out)},
        manager=manager,
    )["config"]["coupling"]
    assert (info["measured"], info["failed"]) == (2, 1)
    assert info["tasks"]["tiny_pages"]["reasons"] == {"an empty prompt has no token to measure": 1}
    assert sorted(load_records(out).n_tokens.tolist())[0] == 0


def test_a_document_without_a_prompt_is_counted(evaluate, monkeypatch):
    """Where a prompt could not be made, the document vanished from the count."""
    right = prompts.document_prompts
    calls = []

    def broken(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such template")
        return [] if len(calls) == 2 else right(*args)

    monkeypatch.setattr("lm_eval_coupling.harness.lm.document_prompts", broken)
    info = evaluate(kinds=("choice",), arguments={"coupling_limit": 3})["config"]["coupling"]
    assert (info["measured"], info["failed"]) == (1, 2)
    assert set(info["tasks"]["tiny_choice"]["reasons"]) == {
        "no prompt: RuntimeError: no such template",
        "an empty prompt has no token to measure",
    }


def test_interrupted_before_the_first_is_no_failure(evaluate, monkeypatch, caplog):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_coupling.runs.session.measure_prompts", interrupted)
    found = evaluate(kinds=("choice",))
    assert (
        found["config"]["coupling"]["interrupted"] and not found["config"]["coupling"]["measured"]
    )
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    assert "Interrupted: what was measured is kept" in closing_lines(
        found["config"]["coupling"], found
    )


def test_a_revision_of_a_folder_is_not_taken_for_one(evaluate):
    """transformers reads the folder as it is."""
    found = evaluate(kinds=("choice",), arguments={"revision": "step1"})["config"]
    assert found["coupling"]["revision"] == "main" and found["model_revision"] == "step1"
