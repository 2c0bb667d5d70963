"""What cannot be measured costs neither the scores nor what was measured."""

import json
import sqlite3

import torch
from evaluations import scores

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
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(home / "float32").save_pretrained(tmp_path / "broken")
    found = evaluate(kinds=("choice",), pretrained=tmp_path / "broken")
    expected = evaluate("hf", kinds=("choice",), pretrained=tmp_path / "broken")
    assert scores(found)[1] == scores(expected)[1]
    info = found["config"]["coupling"]
    assert info["measured"] == 0 and info["failed"] == 2
    assert "block 2 is not finite" in json.dumps(info["tasks"])


def test_a_store_that_cannot_be_written_costs_nothing(evaluate, monkeypatch):
    from lm_eval_coupling.runs.store import MeasurementStore

    def full(self, entries):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(MeasurementStore, "put", full)
    assert evaluate(kinds=("choice",))["config"]["coupling"]["measured"] == 2


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
