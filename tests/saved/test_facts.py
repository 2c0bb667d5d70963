"""Facts are typed where they are read: understood, or refused with the file, the line and why."""

import json
import math

import pytest
from saved_runs import sample, save, task_summary, write_samples

from lm_eval_coupling import load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit.losses import gold_answers
from lm_eval_coupling.saved.csv_file import read_csv
from lm_eval_coupling.saved.facts import add_facts
from lm_eval_coupling.saved.names import facts_from_name
from lm_eval_coupling.saved.samples import read_answers


def added(folder, text):
    runs = load_runs(save(folder / "runs", {"t": task_summary()}))
    file = folder / "facts.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return add_facts(runs, file).iloc[0]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        (b"\xef\xbb\xbfmodel,family\ntiny,x\n", "family", "x"),
        ("Model , Training Tokens\n tiny , 3e11 \n", "training_tokens", 3e11),
        ("model,family\r\ntiny,x\r\n\r\n,\r\n", "family", "x"),
        ("model,family,,\ntiny,x,,\n", "family", "x"),
        ("model,released\ntiny,2024-05-01\n", "released", 2024.331),
        ("model,begun\ntiny,2024-07-01\nother,NA\n", "begun", 2024.497),
        ("model,released\ntiny,2024.5\nother,2023-01-01\n", "released", 2024.5),
        ("model,step\ntiny,5\n", "step", 5),
        *((f"model,tuned\ntiny,{word}\n", "tuned", True) for word in ("y", "T", "Yes", "on", "1")),
        *((f"model,tuned\ntiny-it,{word}\n", "tuned", False) for word in ("n", "F", "no", "0")),
    ],
)
def test_what_people_write_is_understood(tmp_path, text, name, value):
    assert added(tmp_path, text)[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model;family\ntiny;x\n", "separate them by commas"),
        ("model\tfamily\ntiny\tx\n", "separate them by commas"),
        (
            'model,training_tokens\ntiny,"300,000"\n',
            r"'300,000' in the column training_tokens .line",
        ),
        ('model,loss\ntiny,"1,5"\n', "expected a number"),
        ("model,share\ntiny,50%\n", "expected a number"),
        ("model,loss\ntiny,inf\n", "expected a number"),
        ("model,n_params\ntiny,-5\n", "expected a positive whole number"),
        ("model,n_params\ntiny,0\n", "expected a positive whole number"),
        ("model,released\ntiny,20240501\n", "expected a date such as"),
        ("model,released\ntiny,2024-02-30\n", "expected a date such as"),
        ("model,released\ntiny,May 2024\n", "expected a date such as"),
        ("model,training_tokens\ntiny,-1\n", "expected a number of 0 or more"),
        ("model,step\ntiny,-3\n", "expected a number of 0 or more"),
        ("model,n_layers\ntiny,12.5\n", "expected a positive whole number"),
        ("model,tuned\ntiny,maybe\n", "'maybe' in the column tuned .*expected true or false"),
        ("model,a,a\ntiny,1,2\n", "two columns 'a'"),
        ("model,family,Family\ntiny,a,b\n", "two columns family, 'family' and 'Family'"),
        ("model,n_params,N Params\ntiny,5,6\n", "two columns n_params, 'n_params' and 'N Params'"),
        ("model,a\norg/tiny,1\ntiny,2\n", "got tiny and org/tiny in .* name one model"),
        ("model,a,b\ntiny,1\n", "2 cells in line 2, expected 3"),
        ("model,a\n,1\n", "without a model in the row of line 2"),
        ("model,a\ntiny,1\ntiny,2\n", "tiny more than once .lines 2 and 3"),
        ("model,log10_params\ntiny,9\n", "'log10_params', which the runs have themselves, or"),
        ("model,coupling@99\ntiny,9\n", "rename it"),
        ("model,other_tasks_mean\ntiny,9\n", "rename it"),
        ("model,mean_of\ntiny,9\n", "rename it"),
        ("model,family\ntiny,é\n".encode("latin1"), "it is no UTF-8 text"),
        ("", "it is empty"),
    ],
)
def test_what_has_no_one_meaning_is_refused_by_name_and_place(tmp_path, text, message):
    with pytest.raises(CouplingError, match=message):
        added(tmp_path, text)


@pytest.mark.parametrize(
    ("facts", "warned"),
    [
        ({"tuned": "yes"}, False),
        ({"tuned": "maybe"}, True),
        ({"n_params": "7b"}, True),
        ({"n_params": 0}, True),
        ({"n_layers": -3}, True),
        ({"training_tokens": 0}, False),
        ({"training_tokens": True}, True),
        ({"released": 20240501}, True),
        ({"family": [1]}, True),
        ({"log10_params": 3}, True),
        ({"loss": math.inf}, True),
        ({"gsm,none": 0.5}, True),
        ([], True),
    ],
)
def test_facts_of_a_sweep_are_typed_as_well(tmp_path, caplog, facts, warned):
    """`tuned: yes` of a plan was a text, which ended `fit` much later."""
    where = save(tmp_path, {"t": task_summary()})
    (where / "facts.json").write_text(json.dumps(facts))
    (row,) = load_runs(where).to_dict("records")
    assert ("was left out" in caplog.text) == warned and row["n_params"] == 1e6
    assert bool(row["tuned"]) == (facts == {"tuned": "yes"}) and "log10_params" not in row


@pytest.mark.parametrize(
    ("revision", "step", "tokens"),
    [
        ("step-100k", 1e5, None),
        ("step1.5k", 1500, None),
        ("step10-tokens1.5T", 10, 1.5e12),
        ("stage1-step928646-tokens3896B", 928646, 3.896e12),
        ("stage2-ingredient1-step11931-tokens50B", None, None),
        ("checkpoint-1_000", None, None),
        ("step1,000", None, None),
        ("stage02-step10-tokens5B", None, None),
        ("phase2-step10", None, None),
        ("anneal-step10-tokens5B", None, None),
        ("footstep12", None, None),
    ],
)
def test_steps_of_revisions(revision, step, tokens):
    """Stage 2 of a training came before stage 1, and step 100k was step 100."""
    facts = facts_from_name("org/x", revision)
    actual = [None if facts[n] != facts[n] else facts[n] for n in ("step", "training_tokens")]
    assert actual == [step, tokens]


@pytest.mark.parametrize(
    ("model", "lineage", "step", "family"),
    [
        ("me/run-epoch3", "me/run", 3, "run"),
        ("me/pythia-410m-step1000", "me/pythia-410m", 1000, "pythia"),
        ("run_checkpoint-2k", "run", 2000, "run"),
        ("me/epoch3/model", "me/epoch3/model", None, "model"),
        ("me/onestep2", "me/onestep2", None, "onestep2"),
    ],
)
def test_checkpoints_whose_step_ends_the_name(model, lineage, step, family):
    """Ten epochs of one training were ten models, and their scores rose beyond chance."""
    facts = facts_from_name(model, "main")
    actual = (facts["lineage"], None if facts["step"] != facts["step"] else facts["step"])
    assert (*actual, facts["family"]) == (lineage, step, family)


@pytest.mark.parametrize(
    ("likelihoods", "accuracy", "doc", "right"),
    [
        ((-3, -1, -2), 1.0, {}, 1),  # the most likely choice was right: the index
        ((-3, -2, -1), 1.0, {}, 2),  # the text
        ((-3, -2, -1), 0.0, {}, 1),
        ((-1, -2, -3), 0.0, {"answer": "1"}, 2),
        ((-1, -2, -3), 0.0, {"answer": 1}, 1),
        ((-1, -2, -3), None, {"answer": 1, "q": "How many?"}, 1),
        ((-1, -2, -3), 0.0, {"answer": 1, "text": "1"}, None),
        ((-1, -2, -3), 0.0, {}, None),
    ],
)
def test_a_target_that_may_be_the_index_or_the_text_of_a_choice(
    tmp_path, likelihoods, accuracy, doc, right
):
    """The loss of 75 documents of MMLU was that of another choice than the right one."""
    line = sample(
        "d0",
        target="1",
        doc=doc,
        acc=accuracy,
        arguments={f"a{i}": {"arg_0": "?", "arg_1": f" {c}"} for i, c in enumerate("231")},
        filtered_resps=[[str(value), "False"] for value in likelihoods],
    )
    answers = read_answers(write_samples(tmp_path, "t", [line]), "acc,none")
    losses = [loss for loss, _ in gold_answers(answers)]
    assert losses == ([] if right is None else [-likelihoods[right] / 2])


def test_lines_of_samples_are_counted(tmp_path):
    lines = [sample(f"d{number}") for number in range(4)]
    for kept, given in ((lines, 0), (lines[:1] + lines[2:], 1), ([*lines, lines[0]], 1)):
        problems = []
        file = write_samples(tmp_path, "t", kept)
        read_answers(file, "acc,none", evaluated=4.0, problems=problems)
        assert len(problems) == given
    problems = []
    odd = [sample("d0", metrics=3), sample("d1", metrics=["acc"], acc=10**400), sample("d2")]
    answers = read_answers(write_samples(tmp_path, "t", odd), "acc,none", problems=problems)
    assert list(answers) == ["d2"] and "2 lines that are not as lm-eval writes them" in problems[0]


def test_lines_and_years_of_a_csv_file(tmp_path):
    """A quoted cell may span lines; dates beside years are years as well."""
    file = tmp_path / "facts.csv"
    file.write_text('model,note,made\na,"x\ny",2024\nb,z,2025-07-01\n\nc,,\n')
    table = read_csv(file, ["model"], "facts")
    assert table.lines == (2, 4, 6)
    assert table.values("made") == pytest.approx([2024, 2025.496, math.nan], nan_ok=True)
