"""Unusable logged evaluations are refused in one sentence; cut ones are read as far as they go."""

import json
import logging
import os

import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.samples import logged


def read_evaluations(path, model, revision="main"):
    return [logged.read_evaluation(file) for file in logged.find_evaluations(path, model, revision)]


def read_evaluation(path):
    (evaluation,) = read_evaluations(path, "org/model")
    return evaluation


SAMPLE = {
    "doc_id": 0,
    "doc_hash": "a",
    "prompt_hash": "b",
    "arguments": {"gen_args_0": {"arg_0": "Question:", "arg_1": " yes"}},
}


def save(folder, *samples, results=None, date="2026-01-01T00-00-00.0", task="t"):
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "configs": {task: {"output_type": "multiple_choice"}},
        "n-samples": {task: {"effective": 1}},
    }
    (folder / f"results_{date}.json").write_text(json.dumps(about if results is None else results))
    if samples:
        lines = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
        (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def without(name):
    return {key: value for key, value in SAMPLE.items() if key != name}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (without("arguments"), "line 1 of .* without the requests of lm-eval .*--log_samples"),
        (SAMPLE | {"arguments": [["Question:", " yes"]]}, "without the requests of lm-eval"),
        (SAMPLE | {"arguments": {}}, "without the requests of lm-eval"),
        (without("doc_hash"), "line 1 of .* without doc_hash and prompt_hash"),
        ("3", "line 1 of .* without doc_hash and prompt_hash"),
        ("{cut", "without a whole line, expected the samples of t"),
    ],
)
def test_unusable_samples_are_refused(tmp_path, sample, message):
    with pytest.raises(CouplingError, match=message):
        read_evaluation(save(tmp_path, sample))


def test_a_cut_line_is_named_and_the_others_are_read(tmp_path, caplog):
    folder = save(tmp_path, SAMPLE, '{"doc_id": 1, "doc_ha')
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        evaluation = read_evaluation(folder)
    assert "line 2 of" in caplog.text and "cut off" in caplog.text
    assert [sample["doc_id"] for sample in evaluation.samples["t"]] == [0]


def test_missing_documents_are_counted(tmp_path, caplog):
    about = {"configs": {"t": {}}, "n-samples": {"t": {"effective": 7}}}
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        read_evaluation(save(tmp_path, SAMPLE, results=about))
    assert "1 of 7 documents of t are among the samples" in caplog.text


@pytest.mark.parametrize("results", [{}, [], {"configs": None}, 3])
def test_other_files_are_no_results(tmp_path, results):
    with pytest.raises(CouplingError, match="expected the results of lm-eval"):
        read_evaluation(save(tmp_path, SAMPLE, results=results))


def test_a_folder_without_or_with_several_evaluations_is_refused(tmp_path):
    with pytest.raises(CouplingError, match="expected a results_"):
        read_evaluation(tmp_path / "nowhere")
    save(tmp_path / "one", SAMPLE)
    save(tmp_path / "two", SAMPLE)
    with pytest.raises(CouplingError, match="with 2 evaluations .* task t, .* give its results f"):
        read_evaluation(tmp_path)


def results_of(model, task, revision="main"):
    return {
        "configs": {task: {"output_type": "multiple_choice"}},
        "config": {"model_args": {"pretrained": model}, "model_revision": revision},
    }


def test_of_a_folder_of_several_models_those_of_the_model_are_read(tmp_path):
    for number, (model, task, revision) in enumerate(
        [
            ("org/model", "a", "main"),
            ("somewhere/Model", "b", "main"),
            ("org/model", "a", "step1"),
            ("org/another", "a", "main"),
        ]
    ):
        about = results_of(model, task, revision)
        save(tmp_path / str(number), SAMPLE, results=about, task=task)
    evaluations = read_evaluations(tmp_path, "org/model")
    assert [list(evaluation.samples) for evaluation in evaluations] == [["a"], ["b"]]
    (step,) = read_evaluations(tmp_path, "org/model", "step1")
    assert step.file.parent.name == "2"
    with pytest.raises(CouplingError, match="org/another, org/model, .* of org/third at revision"):
        read_evaluations(tmp_path, "org/third")


def save_named(folder, name, day, *samples, model="org/model", task="t"):
    """Save as lm-eval does with ``--output_path NAME.json``: NAME_<date>.json."""
    date = f"2026-01-0{day}T00-00-00.0"
    save(folder, *samples, results=results_of(model, task), date=date, task=task)
    return (folder / f"results_{date}.json").rename(folder / f"{name}_{date}.json")


def test_samples_of_another_run_are_not_read_for_results_of_another_name(tmp_path):
    """The samples of org/other were read as those of org/model."""
    save_named(tmp_path, "base", 1, SAMPLE, model="org/other")
    chat = save_named(tmp_path, "chat", 2)
    with pytest.raises(CouplingError, match="without samples_.*jsonl beside it"):
        logged.read_evaluation(chat)


def test_samples_beside_results_of_another_name_are_those_of_their_date(tmp_path):
    save_named(tmp_path, "base", 1, SAMPLE, model="org/other")
    chat = save_named(tmp_path, "chat", 2, SAMPLE | {"doc_id": 7})
    (sample,) = logged.read_evaluation(chat).samples["t"]
    assert sample["doc_id"] == 7


def test_results_of_another_name_are_found_in_a_folder(tmp_path):
    save_named(tmp_path, "base", 1, SAMPLE, model="org/other")
    chat = save_named(tmp_path, "chat", 2, SAMPLE)
    (tmp_path / "generation_config.json").write_text("{}")
    (evaluation,) = read_evaluations(tmp_path, "org/model")
    assert evaluation.file == chat


def test_other_json_files_are_passed_over_in_a_folder(tmp_path, caplog):
    chat = save_named(tmp_path, "chat", 1, SAMPLE)
    (tmp_path / "log_2026-01-01T00-00-00.0.json").write_text("[]")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "results_a.json").mkdir()
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        (evaluation,) = read_evaluations(tmp_path, "org/model")
    assert evaluation.file == chat
    assert "log_2026-01-01T00-00-00.0.json" in caplog.text and "results.json" not in caplog.text


def test_renamed_results_have_the_samples_that_can_only_be_their_own(tmp_path):
    renamed = save_named(tmp_path, "base", 1, SAMPLE).rename(tmp_path / "renamed.json")
    (tmp_path / "generation_config.json").write_text("{}")
    assert list(logged.read_evaluation(renamed).samples) == ["t"]
    (tmp_path / "copy.json").write_text(renamed.read_text())
    with pytest.raises(CouplingError, match="without samples_.*jsonl that can only be its own"):
        logged.read_evaluation(renamed)


def test_samples_of_a_longer_task_are_not_taken_for_those_of_a_task(tmp_path):
    """The name of the task t_2024 begins as the task t and the century of a date do."""
    renamed = save_named(tmp_path, "base", 1).rename(tmp_path / "renamed.json")
    samples = tmp_path / "samples_t_2024_2026-01-01T00-00-00.0.jsonl"
    samples.write_text(json.dumps(SAMPLE) + "\n")
    with pytest.raises(CouplingError, match="without samples_.*jsonl that can only be its own"):
        logged.read_evaluation(renamed)


def test_results_without_samples_are_refused(tmp_path):
    with pytest.raises(CouplingError, match="without samples_.*--log_samples"):
        read_evaluation(save(tmp_path))


def test_images_and_other_output_types_are_refused(tmp_path):
    picture = {"gen_args_0": {"arg_0": "Q", "arg_1": {}, "arg_2": {"visual": []}}}
    evaluation = read_evaluation(save(tmp_path / "a", SAMPLE | {"arguments": picture}))
    with pytest.raises(CouplingError, match="images or audio"):
        evaluation.requests("t", evaluation.samples["t"][0])
    evaluation = read_evaluation(save(tmp_path / "b", SAMPLE, results={"configs": {"t": {}}}))
    with pytest.raises(CouplingError, match="output_type=None for task t"):
        evaluation.requests("t", evaluation.samples["t"][0])


def test_one_document_with_several_filters_is_one(tmp_path):
    folder = save(tmp_path, SAMPLE | {"filter": "strict"}, SAMPLE | {"filter": "flexible"})
    assert len(read_evaluation(folder).documents("t")) == 1


def test_groups_are_nested_as_they_were_requested(tmp_path):
    about = {
        "configs": {"t": {"output_type": "multiple_choice"}},
        "group_subtasks": {"outer": ["inner", "t"], "inner": ["t"], "t": []},
    }
    evaluation = read_evaluation(save(tmp_path, SAMPLE, results=about))
    assert evaluation.roots == [[["t"], "t"]]
    assert evaluation.members == {"outer": ["t"], "inner": ["t"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_hash": ["a"]}, "without doc_hash and prompt_hash"),
        ({"doc_id": None}, "without doc_hash and prompt_hash"),
        ({"arguments": {"gen_args_0": {}}}, "without the requests"),
        ({"arguments": {"gen_args_0": {"context": "Q"}}}, "without the requests"),
        ({"arguments": {"gen_args_1": {"arg_0": "Q"}}}, "without the requests"),
    ],
)
def test_misshapen_samples_are_refused(tmp_path, change, message):
    """Each ended in a traceback while the model was measured."""
    with pytest.raises(CouplingError, match=message):
        read_evaluation(save(tmp_path, SAMPLE | change))


def test_counts_and_groups_of_another_shape(tmp_path):
    about = {
        "configs": {"t": {"output_type": "multiple_choice"}},
        "n-samples": {"t": {"effective": "1"}},
        "group_subtasks": {"top": ["a"], "a": ["b"], "b": ["a", "t"]},
    }
    assert read_evaluation(save(tmp_path, SAMPLE, results=about)).roots == [[[["t"]]]]


def test_responses_of_another_type_are_none(tmp_path):
    evaluation = read_evaluation(save(tmp_path, SAMPLE | {"resps": {"a": 1}}))
    (request,) = evaluation.requests("t", evaluation.samples["t"][0])
    assert request.resps == ()


@pytest.mark.parametrize(
    "results",
    [
        {"configs": {"t": None}},
        {"configs": {"t": {}}, "group_subtasks": {"g": "t"}},
        {"configs": {"t": {}}, "n-samples": 3},
        {"configs": {"x" * 300: {}, "../t": {}, "a\0": {}, "[t]": {}}},
    ],
)
def test_misshapen_results_are_refused(tmp_path, results):
    with pytest.raises(CouplingError, match="got .*results_.*json"):
        read_evaluation(save(tmp_path, SAMPLE, results=results))


def test_lines_that_are_no_json_in_utf_8_are_named_and_left_out(tmp_path, caplog):
    """A file of another encoding was a traceback; a name that stands twice had its last value."""
    folder = save(tmp_path, SAMPLE)
    (file,) = folder.glob("samples_*")
    line = json.dumps(SAMPLE | {"doc_id": 1, "target": "é"}, ensure_ascii=False)
    twice = json.dumps(SAMPLE)[:-1] + ', "doc_id": 2}'
    with file.open("ab") as lines:
        lines.write(line.encode("latin-1") + b"\n" + twice.encode() + b"\n" + b"[" * 10**5)
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        (sample,) = read_evaluation(folder).samples["t"]
    assert sample["doc_id"] == 0
    reasons = ("line 2 of", "no UTF-8", "line 3 of", "'doc_id' twice", "line 4 of", "nested more")
    assert all(reason in caplog.text for reason in reasons)


def test_pipes_among_evaluations_are_not_opened(tmp_path):
    folder = save(tmp_path, SAMPLE)
    os.mkfifo(folder / "samples_u_2026-01-01T00-00-00.0.jsonl")
    assert list(read_evaluation(folder).samples) == ["t"]
    os.mkfifo(folder / "results_pipe.json")
    with pytest.raises(CouplingError, match="results_pipe.json, .* no regular file"):
        read_evaluation(folder)
