"""Runs that differ in anything that makes prompts or answers are told apart, by name."""

import json

import pytest
from saved_runs import DATE, record, save, task_summary

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.report.overview_rows import overview
from lm_eval_coupling.saved.names import label_rows, label_trainings
from lm_eval_coupling.saved.prompting import find_disagreements, readable
from lm_eval_coupling.saved.saved_run import find_runs

ARC = {"doc_to_text": "{{q}}", "output_type": "multiple_choice"}
GENERATED = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}}
# What lm-eval writes of two runs, and the word that tells them apart.
DIFFERENCES = {
    "task version": ({"versions": {"arc": 1.0}}, {"versions": {"arc": 2}}),
    "text version": ({"versions": {"arc": "1.0.0"}}, {"versions": {"arc": "1.0.1"}}),
    "task text": tuple({"configs": {"arc": {"doc_to_text": text}}} for text in ("a", "b")),
    "subset": tuple({"configs": {"arc": ARC | {"dataset_name": n}}} for n in ("easy", "hard")),
    "split": tuple({"configs": {"arc": ARC | {"test_split": n}}} for n in ("test", "dev")),
    "metadata": tuple(
        {"configs": {"arc": ARC | {"metadata": {"version": 1, "max_seq_lengths": [n]}}}}
        for n in (4096, 8192)
    ),
    "generation": tuple(
        {"configs": {"arc": GENERATED | {"generation_kwargs": {"do_sample": b}}}}
        for b in (False, True)
    ),
    "until": tuple(
        {"configs": {"arc": GENERATED | {"generation_kwargs": {"until": [u]}}}}
        for u in ("\n", "\n\n")
    ),
    "most tokens, of a task without settings of its own": tuple(
        {
            "configs": {"arc": {"output_type": "generate_until"}},
            "config": {"model_args": {"pretrained": "org/x", "max_gen_toks": n}},
        }
        for n in (64, 512)
    ),
    "system instruction": ({}, {"system_instruction": "Be brief."}),
    "filters": tuple(
        {"configs": {"arc": GENERATED | {"filter_list": [{"name": "strict", "filter": [regex]}]}}}
        for regex in ("a", "b")
    ),
    "repeats": tuple({"configs": {"arc": GENERATED | {"repeats": n}}} for n in (1, 8)),
    "metrics": tuple(
        {"configs": {"arc": ARC | {"metric_list": [{"metric": "acc", "ignore_case": b}]}}}
        for b in (False, True)
    ),
    "shots": ({"n-shot": {"arc": 0}}, {"n-shot": {"arc": 5}}),
    "shots, of a tokenizer that is named like a number of them": tuple(
        {
            "n-shot": {"arc": n},
            "config": {"model_args": {"pretrained": "org/x", "tokenizer": "me/few-shot"}},
        }
        for n in (0, 5)
    ),
    "turns": tuple(
        {"chat_template": "x", "chat_template_sha": "1" * 8, "fewshot_as_multiturn": b}
        for b in (True, False)
    ),
    "output type": tuple(
        {"configs": {"arc": ARC | {"output_type": t}}} for t in ("multiple_choice", "loglikelihood")
    ),
    "seed of sampling": tuple(
        {
            "configs": {"arc": GENERATED},
            "config": {"gen_kwargs": {"do_sample": True}, "torch_seed": seed},
        }
        for seed in (1234, 0)
    ),
    "logged documents": tuple({"task_hashes": {"arc": digit * 64}} for digit in "ab"),
    "documents": tuple(
        {"prompts": {"arc": {"num_fewshot": 5, "documents": {"number": 50, "digest": digit * 64}}}}
        for digit in "ab"
    ),
}


def edit(where, date, changes):
    file = where / f"results_{date}.json"
    run = json.loads(file.read_text())
    run["config"] |= changes.get("config", {})
    run["config"]["coupling"] |= {k: changes[k] for k in ("prompts",) if k in changes}
    others = {k: v for k, v in changes.items() if k not in ("config", "prompts")}
    file.write_text(json.dumps(run | others))


# What two runs of the group `all` of arc and gsm differ in, with every task's own part the same.
OF_GROUPS = {
    "shots by task": tuple({"n-shot": {"arc": n, "gsm": 5 - n}} for n in (0, 5)),
    "group version": tuple({"versions": {"arc": 1, "gsm": 1, "all": n}} for n in (1, 2)),
    "group tasks": tuple({"group_subtasks": {"all": names}} for names in (["arc", "gsm"], ["arc"])),
}


@pytest.mark.parametrize("what", OF_GROUPS)
def test_differences_of_a_group(tmp_path, what):
    """0 and 5 examples for its two tasks, and 5 and 0, were one "0/5-shot" for the group."""
    tasks = {"arc": task_summary(), "gsm": task_summary()}
    for model, changes in zip(("org/a-1b", "org/b-2b"), OF_GROUPS[what], strict=True):
        where = save(
            tmp_path, tasks, model=model, fingerprint=model, groups={"all": ["arc", "gsm"]}
        )
        edit(where, DATE, changes)
    rows = load_runs(tmp_path)
    assert rows.loc[rows["task"] == "all", "prompting"].nunique() == 2
    with pytest.raises(CouplingError, match=f"got all with different {what}"):
        scored_rows(rows[rows["task"] == "all"], [])


@pytest.mark.parametrize("what", DIFFERENCES)
def test_differences_keep_runs_of_a_model_apart(tmp_path, what):
    for number, changes in enumerate(DIFFERENCES[what]):
        date = f"2025-06-0{number + 1}T00-00-00"
        rows = [record(seed=number)]
        edit(save(tmp_path, {"arc": task_summary()}, date=date, rows=rows), date, changes)
    rows = load_runs(tmp_path)
    assert len(rows) == 2 == rows["prompting"].nunique() == label_rows(rows).nunique()
    assert len(load_records(tmp_path)) == 2


@pytest.mark.parametrize("what", DIFFERENCES)
def test_differences_between_models_are_refused_by_name_unless_asked_for(tmp_path, what):
    """Only numbers of examples and numeric versions were compared between models."""
    for model, changes in zip(("org/a-1b", "org/b-2b"), DIFFERENCES[what], strict=True):
        edit(save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model), DATE, changes)
    rows = load_runs(tmp_path)
    with pytest.raises(CouplingError, match="got arc with different .*--mixed keep") as error:
        scored_rows(rows, [])
    assert "a-1b/results" in str(error.value).replace("org__", "") and "b-2b" in str(error.value)
    notes = []
    assert len(scored_rows(rows, notes, mixed="keep")) == 2
    assert any("models differ in the" in note for note in notes)


def test_hashes_of_other_numbers_of_documents_say_nothing(tmp_path):
    """More documents of one task have another hash than fewer of them."""
    for number, model in enumerate(("org/a-1b", "org/b-2b")):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        counts = {"arc": {"original": 100, "effective": 40 + number}}
        edit(where, DATE, {"task_hashes": {"arc": f"{number}" * 64}, "n-samples": counts})
    rows, notes = load_runs(tmp_path), []
    assert rows["prompting"].nunique() == 1 and len(scored_rows(rows, notes)) == 2
    assert "models differ in the numbers of documents of arc" in notes


def test_hashes_of_prompts_of_two_chat_templates_say_nothing(tmp_path):
    """lm-eval's hash is of the prompts too, which the templates of two models make differ."""
    for number, model in enumerate(("org/a-1b", "org/b-2b")):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        template = {"chat_template": f"t{number}", "chat_template_sha": f"{number}" * 8}
        edit(where, DATE, template | {"task_hashes": {"arc": f"{number}" * 64}})
    assert len(scored_rows(load_runs(tmp_path), [])) == 2


def test_models_in_two_dtypes_are_compared_with_a_note(tmp_path):
    """Nothing was said, and two runs of one model had one label in `show`."""
    for number, dtype in enumerate(("float32", "bfloat16")):
        for model in ("org/a-1b", f"org/b{number}-2b"):
            save(
                tmp_path / dtype,
                {"arc": task_summary()},
                model=model,
                fingerprint=model,
                run_id=f"{model} {dtype}",
                model_dtype=dtype,
                rows=[record(seed=number)],
            )
    notes = []
    scored_rows(load_runs(tmp_path), notes)
    assert "models differ in the dtype of arc" in notes
    labels = set(overview(find_runs(tmp_path).with_tables(), [])["label"])
    assert {"org/a-1b [float32]", "org/a-1b [bfloat16]"} < labels and len(labels) == 4


def test_what_belongs_to_a_model_does_not_keep_models_apart(tmp_path):
    for number, model in enumerate(("org/a-1b", "org/b-2b")):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        arguments = {"pretrained": model, "add_bos_token": bool(number), "max_length": 512 + number}
        metadata = {"version": 1, **arguments, "coupling_ranks": str(number)}
        template = {"chat_template": "x" * number, "chat_template_sha": "abcdefgh" * number}
        config = {"configs": {"arc": ARC | {"metadata": metadata}}, **template}
        edit(where, DATE, config | {"config": {"model_args": arguments}})
    notes = []
    assert len(scored_rows(load_runs(tmp_path), notes)) == 2
    assert any("use of a chat template" in note for note in notes)


@pytest.mark.parametrize("second", ["bfloat16", "torch.bfloat16", "auto", None])
def test_a_dtype_given_in_two_ways_is_one_run(tmp_path, second):
    """`dtype=auto`, which resolved to bfloat16, and `dtype=bfloat16` were two models."""
    for number, dtype in enumerate(("auto", second)):
        date = f"2025-06-0{number + 1}T00-00-00"
        where = save(tmp_path, {"arc": task_summary()}, date=date, run_id=str(number))
        given = {"pretrained": "org/tiny"} | ({"dtype": dtype} if dtype else {})
        edit(where, date, {"config": {"model_args": given}})
    (row,) = load_runs(tmp_path).to_dict("records")
    assert (row["variant"], row["dtype"]) == ("", "bfloat16")


def test_scores_in_another_dtype_are_not_those_of_the_measured_run(tmp_path):
    """They vanished behind it."""
    save(tmp_path, {"arc": task_summary()})
    date = "2025-07-01T00-00-00"
    where = save(tmp_path, {"arc": task_summary()}, date=date, coupling=False)
    for dtype, rows in (("torch.float32", 2), ("torch.bfloat16", 1), (None, 1)):
        run = json.loads((where / f"results_{date}.json").read_text())
        run["config"] |= {"model_dtype": dtype, "model_args": "pretrained=org/tiny"}
        (where / f"results_{date}.json").write_text(json.dumps(run))
        assert len(load_runs(tmp_path)) == rows


@pytest.mark.parametrize(
    ("name", "other", "usual"),
    [
        ("mixed_precision_dtype", "torch.bfloat16", None),
        ("softmax_dtype", "float32", "None"),
        ("use_fast_tokenizer", False, True),
    ],
)
def test_scores_in_other_arithmetic_do_not_replace_those_of_a_model(tmp_path, name, other, usual):
    """The newest one of them counted, without a word."""
    for value, rows in ((usual, 1), (other, 2)):
        for number in (0, 1):
            date = f"2025-06-0{1 + rows}T12-00-00.{number}"
            where = save(tmp_path, {"arc": task_summary()}, date=date, run_id=date)
            arguments = {"pretrained": "org/tiny"} | ({name: value} if number else {})
            edit(where, date, {"config": {"model_args": arguments}})
        assert len(load_runs(tmp_path)) == rows


def test_arguments_of_models_that_change_tokens_are_told(tmp_path):
    for number, model in enumerate(("org/a-1b", "org/b-2b")):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        arguments = {"pretrained": model, "enable_thinking": bool(number)}
        edit(where, DATE, {"config": {"model_args": arguments}})
    notes = []
    scored_rows(load_runs(tmp_path), notes)
    assert "models differ in the enable_thinking of arc" in notes


def test_a_generation_setting_of_no_generated_answer_is_no_difference(tmp_path):
    for number, model in enumerate(("org/a-1b", "org/b-2b")):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        kwargs = {"config": {"gen_kwargs": {"temperature": number}}, "configs": {"arc": ARC}}
        edit(where, DATE, kwargs)
    assert len(scored_rows(load_runs(tmp_path), [])) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"do_sample": False, "temperature": 0.0}, {"temperature": 0}),
        ({"do_sample": False}, {"do_sample": "False", "top_p": 0.9}),
        ({"do_sample": True, "temperature": 1}, {"do_sample": "true", "temperature": "1.0"}),
        ({"max_gen_toks": 64}, {"max_new_tokens": 64.0}),
        ({"until": ["x"]}, {"until": "x"}),
        ('{"do_sample": true, "temperature": 0.7}', "do_sample=True,temperature=0.7"),
        ('until=["a", "b"],max_gen_toks=64', {"until": ["a", "b"], "max_gen_toks": 64}),
    ],
)
def test_one_setting_of_generation_given_in_two_ways(tmp_path, first, second):
    """A text of the command line and a number of Python made two ways of prompting."""
    for model, settings in (("org/a-1b", first), ("org/b-2b", second)):
        where = save(tmp_path, {"arc": task_summary()}, model=model, fingerprint=model)
        edit(where, DATE, {"configs": {"arc": GENERATED}, "config": {"gen_kwargs": settings}})
    assert len(scored_rows(load_runs(tmp_path), [])) == 2


def test_what_a_run_does_not_say_is_no_difference():
    known, unknown = "5-shot, task text 11111111, task version 2", "5-shot"
    assert find_disagreements([known, unknown, "unknown prompts", "?-shot"]) == []
    (actual,) = find_disagreements([unknown, known, "5-shot, task version 3"])
    assert (actual.kind, actual.parts) == ("task version", ("task version 2", "task version 3"))
    assert (actual.first, actual.second) == (1, 2)


def test_versions_and_generation_are_told_only_where_they_differ():
    plain = "0-shot, task version 1, generation do_sample=True temperature=1"
    assert readable(plain) == readable(plain, [plain]) == "0-shot"
    other = "0-shot, task version 2, generation do_sample=True temperature=1"
    assert readable(plain, [plain, other]) == "0-shot, task version 1"


@pytest.mark.parametrize(
    "second",
    [
        {"dtype": "float16"},
        {"variant": "peft=a"},
        {"prompting": "5-shot"},
        {"revision": "seed2-step1000"},
    ],
)
def test_checkpoints_that_were_run_in_two_ways_are_two_trainings(second):
    import pandas as pd

    first = {"lineage": "org/p", "variant": "", "dtype": "float32", "prompting": "0-shot"}
    first |= {"revision": "step1000"}
    rows = [item | {"task": "t"} for item in (first, first | second, first, first | second)]
    labels = label_trainings(pd.DataFrame(rows))
    assert labels.nunique() == 2 and labels[0] == labels[2] != labels[1]
