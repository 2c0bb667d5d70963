"""`measure --samples`: values as the evaluation itself would have measured them."""

import json
import logging
import shutil

import numpy as np
import pytest
import tiny
import yaml
from evaluations import evaluate_and_log, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.samples.measure import measure_samples

plugin.install()  # The start-up hook is off in tests.
RANKS = "ranks=2+4"
TASKS = [f"tiny_{kind}" for kind in tiny.KINDS]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, its tasks, and a group of two of them."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "model")
    for kind in tiny.KINDS:
        tiny.save_task(folder / "tasks", kind)
    group = {"group": "pair", "task": ["tiny_winogrande", "tiny_choice"]}
    group["aggregate_metric_list"] = [{"metric": "acc"}]
    (folder / "tasks" / "pair.yaml").write_text(yaml.safe_dump(group))
    return folder


def evaluate(home, out, model, tasks=TASKS, model_args=(), **further):
    """Evaluate by lm-eval's own entry point, logging samples; returns the results."""
    results, _ = evaluate_and_log(
        home,
        out,
        model=model,
        model_args={"pretrained": str(home / "model"), "device": "cpu"} | dict(model_args),
        tasks=tasks,
        **further,
    )
    return results


@pytest.fixture(scope="module")
def scored(home, tmp_path_factory):
    """Every kind of task, scored by ``--model hf``."""
    out = tmp_path_factory.mktemp("scored")
    evaluate(home, out, "hf")
    return out


def measure(home, scored, out, coupling=f"{RANKS},limit=5", model="model", **further):
    store = out.parent / f"{out.name}.sqlite"
    return measure_samples(
        str(home / model),
        scored,
        out,
        coupling=f"{coupling},store={store}",
        device="cpu",
        **further,
    )


def coupling_arguments(tmp_path, **further):
    return {
        "coupling_ranks": "2+4",
        "coupling_limit": 5,
        "coupling_store": str(tmp_path / "own"),
    } | further


def equal_records(one, other):
    columns = [
        "task",
        "doc_hash",
        "prompt_hash",
        "prompt_index",
        "kind",
        "text",
        "n_tokens",
        "doc_id",
    ]
    order = ["task", "doc_hash", "prompt_index"]
    one, other = (frame.sort_values(order).reset_index(drop=True) for frame in (one, other))
    assert one[columns].equals(other[columns])
    for ours, theirs in zip(one.normalized_miscoupling, other.normalized_miscoupling, strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)


def test_values_are_those_of_the_run_itself(home, scored, tmp_path):
    """To the last bit, for every output type; scores are the evaluation's."""
    evaluate(home, tmp_path / "run", "coupling-hf", model_args=coupling_arguments(tmp_path))
    before = {file: file.read_bytes() for file in scored.rglob("*.json*")}
    table, interrupted, _ = measure(home, scored, tmp_path / "out")
    assert not interrupted and "coupling" in table
    equal_records(load_records(tmp_path / "run"), load_records(tmp_path / "out"))
    own, measured = written(tmp_path / "run"), written(tmp_path / "out")
    for task in TASKS:
        for metric, value in own["results"][task].items():
            assert measured["results"][task][metric] == value
    assert {file: file.read_bytes() for file in scored.rglob("*.json*")} == before
    assert len(load_runs(tmp_path / "out")) == len(TASKS)


def test_documents_of_a_group_are_spread_as_in_the_run(home, tmp_path):
    evaluate(home, tmp_path / "scored", "hf", tasks=["pair"], num_fewshot=1)
    arguments = coupling_arguments(tmp_path)
    evaluate(home, tmp_path / "run", "coupling-hf", ["pair"], arguments, num_fewshot=1)
    measure(home, tmp_path / "scored", tmp_path / "out")
    equal_records(load_records(tmp_path / "run"), load_records(tmp_path / "out"))
    own, measured = (written(tmp_path / name)["groups"]["pair"] for name in ("run", "out"))
    assert measured["coupling,none"] == own["coupling,none"]


def test_a_chat_template_is_part_of_the_prompt(home, tmp_path):
    tasks, chat = ["tiny_choice", "tiny_generate"], {"apply_chat_template": True}
    evaluate(home, tmp_path / "scored", "hf", tasks, **chat)
    evaluate(home, tmp_path / "run", "coupling-hf", tasks, coupling_arguments(tmp_path), **chat)
    measure(home, tmp_path / "scored", tmp_path / "out")
    equal_records(load_records(tmp_path / "run"), load_records(tmp_path / "out"))


def test_measuring_what_coupling_hf_left_counts_as_the_same_prompts(home, tmp_path):
    evaluate(home, tmp_path / "run", "coupling-hf", ["tiny_choice"], coupling_arguments(tmp_path))
    measure(home, tmp_path / "run", tmp_path / "out", coupling=f"{RANKS},limit=2")
    own, measured = written(tmp_path / "run"), written(tmp_path / "out")
    of = [results["config"]["coupling"] for results in (own, measured)]
    assert of[0]["prompts"] == of[1]["prompts"] and of[0]["fingerprint"] == of[1]["fingerprint"]
    samples = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    assert sum(json.loads(line)["coupling"] is not None for line in samples) == 2


@pytest.mark.parametrize(
    ("model_args", "difference"),
    [
        ("dtype=bfloat16", r"dtype \(evaluated float32, loaded bfloat16\)"),
        ("max_length=64", r"maximum length \(evaluated 512, loaded 64\)"),
    ],
)
def test_another_model_is_refused_by_what_differs(home, scored, tmp_path, model_args, difference):
    with pytest.raises(CouplingError, match=f"which differ in {difference}"):
        measure(home, scored, tmp_path / "out", model_args=model_args)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_the_same_model_under_another_name_is_measured_on_request(home, scored, tmp_path, caplog):
    moved = tmp_path / "moved"
    moved.symlink_to(home / "model")
    arguments = {"coupling": f"{RANKS},limit=1,store={tmp_path / 's'}", "device": "cpu"}
    with pytest.raises(CouplingError, match=r"differ in name \(evaluated model, loaded moved\)"):
        measure_samples(str(moved), scored, tmp_path / "out", **arguments)
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        measure_samples(str(moved), scored, tmp_path / "out", same_model=True, **arguments)
    assert "in spite of name" in caplog.text
    recorded = written(tmp_path / "out")["config"]["coupling"]["samples_of"]
    assert recorded["differences"] == ["name (evaluated model, loaded moved)"]


def test_an_output_inside_the_evaluations_is_refused(home, scored):
    with pytest.raises(CouplingError, match="inside --samples .* choose a folder outside of it"):
        measure(home, scored, scored / "measured")
    assert not (scored / "measured").exists()


def with_template(home, folder, template):
    """Copy the model under its own name, with another chat template or none."""
    shutil.copytree(home / "model", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    if template is None:
        (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def test_a_chat_template_that_differs_is_refused(home, tmp_path):
    evaluate(home, tmp_path / "scored", "hf", ["tiny_choice"], apply_chat_template=True)
    other = with_template(home, tmp_path / "other", "{{ messages[0].content }}!")
    with pytest.raises(CouplingError, match=r"which differ in chat template \(evaluated \w+, lo"):
        measure(other, tmp_path / "scored", tmp_path / "out")
    none = with_template(home, tmp_path / "none", None)
    with pytest.raises(CouplingError, match="which differ in chat template"):
        measure(none, tmp_path / "scored", tmp_path / "out")


def copied(home, folder, name):
    """Copy the model under a name."""
    shutil.copytree(home / "model", folder / name)
    return folder / name


def test_other_weights_under_the_same_name_are_refused(home, tmp_path):
    """Where the evaluation was one of `coupling-hf`, whose results hold a fingerprint."""
    evaluate(home, tmp_path / "run", "coupling-hf", ["tiny_choice"], coupling_arguments(tmp_path))
    changed = copied(home, tmp_path / "other", "model")
    model = AutoModelForCausalLM.from_pretrained(changed)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    model.save_pretrained(changed)
    with pytest.raises(CouplingError, match=r"which differ in weights \(evaluated \w+, loaded \w"):
        measure(tmp_path / "other", tmp_path / "run", tmp_path / "out")


def test_another_tokenizer_is_refused(home, tmp_path):
    """Texts decode back with any tokenizer: the tokens differed without a word."""
    other = copied(home, tmp_path, "another")
    evaluate(home, tmp_path / "scored", "hf", ["tiny_choice"], {"tokenizer": str(other)})
    with pytest.raises(CouplingError, match=r"tokenizer \(evaluated another, loaded model\)"):
        measure(home, tmp_path / "scored", tmp_path / "out", coupling=f"{RANKS},limit=1")
    arguments = {"model_args": f"tokenizer={other}", "coupling": f"{RANKS},limit=1"}
    measure(home, tmp_path / "scored", tmp_path / "out", **arguments)


def test_templates_write_the_date_of_the_evaluation(home, tmp_path):
    """They wrote the day on which the samples were measured."""
    evaluate(home, tmp_path / "scored", "hf", ["tiny_choice"])
    as_messages(tmp_path / "scored")
    (file,) = (tmp_path / "scored").rglob("results_*.json")
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"date": 1_000_000_000.0}))
    dated = with_template(
        home, tmp_path / "dated", "{{ strftime_now('%Y') }} {{ messages[0].content }}"
    )
    measure(dated, tmp_path / "scored", tmp_path / "out", coupling=f"{RANKS},limit=2")
    assert load_records(tmp_path / "out").text.str.contains("2001").all()


def as_messages(folder):
    """Log the contexts as a chat API is sent them."""
    (file,) = folder.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for sample in lines:
        for arguments in sample["arguments"].values():
            messages = [{"role": "user", "content": arguments["arg_0"]}]
            arguments["arg_0"] = json.dumps(messages)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_messages_need_a_template(home, tmp_path):
    evaluate(home, tmp_path / "scored", "hf", ["tiny_generate"])
    as_messages(tmp_path / "scored")
    none = with_template(home, tmp_path / "none", None)
    with pytest.raises(CouplingError, match="got messages in the samples, and a tokenizer without"):
        measure(none, tmp_path / "scored", tmp_path / "out")
    measure(home, tmp_path / "scored", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    (row, *_) = load_records(tmp_path / "out").itertuples()
    (sample,) = [s for s in lines_of(tmp_path / "scored") if s["doc_hash"] == row.doc_hash]
    messages = json.loads(sample["arguments"]["gen_args_0"]["arg_0"])
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row.text == rendered


def lines_of(folder):
    (file,) = folder.rglob("samples_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]
