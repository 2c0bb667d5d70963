"""What names and a CSV file say of a model."""

import json
import math

import pandas as pd
import pytest
import saved_runs

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.facts import add_facts
from lm_eval_coupling.saved.names import facts_from_name, labels, short_name
from lm_eval_coupling.saved.prompting import differing, readable


@pytest.mark.parametrize(
    ("model", "family", "tuned"),
    [
        ("EleutherAI/pythia-410m-deduped", "pythia", False),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2", True),
        ("google/gemma-3-270m-it", "gemma-3", True),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5", False),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", False),
        ("stabilityai/stablelm-2-1_6b", "stablelm-2", False),
        ("openai-community/gpt2-xl", "gpt2", False),
        ("microsoft/phi-2", "phi-2", False),
        ("bigscience/bloom-7b1", "bloom", False),
        ("/models/SmolLM2-135M/", "smollm2", False),
        ("C:\\models\\gemma-2b-it", "gemma", True),
        ("7b", "7b", False),
    ],
)
def test_family_and_tuning_from_the_name(model, family, tuned):
    facts = facts_from_name(model, "main")
    assert (facts["family"], facts["tuned"], facts["lineage"]) == (family, tuned, model)
    assert math.isnan(facts["step"])


@pytest.mark.parametrize(
    ("model", "revision", "lineage", "step", "tokens"),
    [
        ("EleutherAI/pythia-410m", "step1000", "EleutherAI/pythia-410m", 1000, math.nan),
        ("allenai/OLMo-1B", "step20000-tokens84B", "allenai/OLMo-1B", 20000, 84e9),
        ("out/pythia-70m/checkpoint-500", "main", "out/pythia-70m", 500, math.nan),
        ("/out/x/global_step7/", "main", "/out/x", 7, math.nan),
        (
            "checkpoint-500",
            "main",
            "checkpoint-500",
            math.nan,
            math.nan,
        ),  # of which training, no one knows
        ("org/two-step-reasoner", "main", "org/two-step-reasoner", math.nan, math.nan),
    ],
)
def test_checkpoints_from_revision_or_folder(model, revision, lineage, step, tokens):
    facts = facts_from_name(model, revision)
    actual = facts["lineage"], facts["step"], facts["training_tokens"]
    assert actual == pytest.approx((lineage, step, tokens), nan_ok=True)


def test_how_prompts_were_made_is_told_in_words_and_digests_only_where_runs_differ():
    """`show` named a task text 6e6f3c5a above every table."""
    first, same = "0-shot, chat template 1f0c22ab, task text 6e6f3c5a", "5-shot, task text 6e6f3c5a"
    other, unknown = "5-shot, task text 77777777, few-shot seed 12345678", "5-shot"
    assert readable(first) == readable(first, [first, same]) == "0-shot, chat template"
    assert readable(same, [first, same]) == "5-shot"
    assert differing([first, same]) == {first: "0-shot, chat template", same: "5-shot"}
    assert differing([same, other]) == {
        same: "task text 6e6f3c5a",
        other: "task text 77777777, few-shot seed 12345678",
    }
    assert differing([same, unknown]) == {same: "task text 6e6f3c5a", unknown: ""}
    changed = first.replace("1f0c22ab", "2f0c22ab")
    assert differing([first, changed]) == {
        first: "chat template 1f0c22ab",
        changed: "chat template 2f0c22ab",
    }


def test_short_names():
    assert [short_name(name) for name in ("org/a-1b", "/x/y/", "C:\\x\\y", "plain")] == [
        "a-1b",
        "y",
        "y",
        "plain",
    ]


@pytest.mark.parametrize(
    "expected",
    [
        {"/x/y/base": "base", "org/a-1b": "a-1b", "plain": "plain"},
        {
            "org1/pythia-410m": "org1/pythia-410m",
            "org2/pythia-410m": "org2/pythia-410m",
            "/secret/gpt2": "gpt2",
        },
        {"/x/a/base/v1": "a/base/v1", "/x/b/base/v1": "b/base/v1", "/x/b/other/v1/": "other/v1"},
        {"base": "base", "C:\\x\\base": "x/base", "x/y/base": "y/base"},
        {"a/base": "a/base", "/a/base": "/a/base"},
        {"/x/a/base": "base", "/x/a/base/": "base"},  # the same folder
        {
            "/x/a": "a",
            "/x/a/checkpoint-1": "a/checkpoint-1",
            "/x/a/checkpoint-2/": "a/checkpoint-2",
        },
        {
            "/x/a/checkpoint-1": "x/a/checkpoint-1",
            "/y/a/checkpoint-2": "y/a/checkpoint-2",
        },  # two trainings
        {"checkpoint-1": "checkpoint-1"},
        {},
    ],
)
def test_labels_have_as_many_parts_as_tell_models_apart(expected):
    """Models with the same last part of their names had one label, and one's numbers."""
    assert labels(iter(expected)) == expected


def test_a_label_says_of_a_checkpoint_what_its_folder_does():
    of = labels(["/x/a/checkpoint-1", "/y/a/checkpoint-2", "C:\\b-1b\\step3"])
    actual = {of[model]: facts_from_name(of[model], "main") for model in of}
    assert {label: (facts["lineage"], facts["step"]) for label, facts in actual.items()} == {
        "x/a/checkpoint-1": ("x/a", 1),
        "y/a/checkpoint-2": ("y/a", 2),
        "b-1b/step3": ("b-1b", 3),
    }


def runs(*models, revision="main"):
    return pd.DataFrame(
        [
            {
                "model": m,
                "revision": revision,
                "n_params": 5.0,
                "acc,none": 0.5,
                **facts_from_name(m, revision),
            }
            for m in models
        ]
    )


def csv(tmp_path, text):
    (tmp_path / "facts.csv").write_text(text)
    return tmp_path / "facts.csv"


def test_the_file_goes_before_the_name_and_adds_columns(tmp_path):
    file = csv(
        tmp_path,
        "model,family,tuned,training_tokens,loss\na-1b,greek,yes,3e11,2.5\norg/b-2b,,0,,\n"
        "unused,x,1,1,1\n",
    )
    actual = add_facts(runs("org/a-1b", "org/b-2b", "org/c-3b"), file)
    assert list(actual["family"]) == ["greek", "b", "c"]
    assert list(actual["tuned"]) == [True, False, False]
    assert actual["training_tokens"].tolist() == pytest.approx(
        [3e11, math.nan, math.nan], nan_ok=True
    )
    assert actual["loss"].tolist() == pytest.approx([2.5, math.nan, math.nan], nan_ok=True)
    assert list(actual["n_params"]) == [5, 5, 5]


def test_facts_of_no_run_are_told_and_leave_numbers_numbers(tmp_path, caplog):
    """A column without a known model held objects, which have no logarithm."""
    file = csv(
        tmp_path, "model,training_tokens,loss,colour\norg/A,3e11,2,red\nzz,1,1,x\nb-2b,1e9,3,blue\n"
    )
    actual = add_facts(runs("org/a-1b", "org/b-2b"), file)
    assert [m.split(" has ")[1] for m in caplog.messages] == [
        "facts of org/A, zz, of which there is no run; the runs are of org/a-1b, org/b-2b"
    ]
    assert actual["training_tokens"].tolist() == pytest.approx([math.nan, 1e9], nan_ok=True)
    nothing = add_facts(runs("org/c"), file)
    assert (
        nothing["training_tokens"].dtype == nothing["loss"].dtype == float
        and nothing["loss"].isna().all()
    )


def test_a_revision_in_the_file_is_of_that_revision_only(tmp_path):
    file = csv(tmp_path, "model,revision,training_tokens\na,step1,10\na,,99\n")
    both = pd.concat([runs("org/a", revision="step1"), runs("org/a", revision="step2")])
    assert list(add_facts(both, file)["training_tokens"]) == [10, 99]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nx\n", "columns name, expected one named model"),
        ("model\na\na\n", "a more than once"),
        ('model,"acc,none"\na,1\n', "column 'acc,none', which the runs have"),
        (
            "model,n_params\na,7b\n",
            "'7b' in the column n_params .line 2., expected a positive whole",
        ),
        ("model\nsame\n", "same in .*, which may be one/same or two/same"),
        ('model\n"', "no readable CSV"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path, text, message):
    with pytest.raises(CouplingError, match=message):
        add_facts(runs("a", "one/same", "two/same"), csv(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CouplingError, match="nowhere.csv, which is no readable CSV"):
        add_facts(runs("a"), tmp_path / "nowhere.csv")


def test_facts_that_lie_beside_results(tmp_path):
    """Facts of a sweep's plan are read without a further file; results' columns stay."""
    from lm_eval_coupling import load_runs

    given = {
        "family": "f",
        "training_tokens": 1e9,
        "colour": "red",
        "task": "x",
        "acc,none": 7,
        "n_layers": 3,
    }
    for folder, facts in (("a", given), ("b", None), ("c", "no JSON")):
        saved_runs.save(
            tmp_path / folder,
            {"arc": saved_runs.task_summary()},
            rows=[saved_runs.record()],
            model=f"m/{folder}",
        )
        if facts is not None:
            (tmp_path / folder / "facts.json").write_text(
                json.dumps(facts) if isinstance(facts, dict) else facts
            )
    runs = load_runs(tmp_path).set_index("model")
    assert runs.loc["m/a", ["family", "training_tokens", "colour", "n_layers"]].tolist() == [
        "f",
        1e9,
        "red",
        3,
    ]
    assert runs.loc["m/a", "task"] == "arc" and runs.loc["m/a", "acc,none"] != 7
    assert runs.loc["m/b", "family"] == "b" and runs.loc["m/c", "colour"] != "red"
