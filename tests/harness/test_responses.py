"""Tokens of what follows a prompt: measured in a run, from samples, and by hand alike."""

import json

import numpy as np
import pytest
import tiny
from evaluations import evaluate_and_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import ResidualModel, load_records, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.harness.responses import continued_prompts
from lm_eval_coupling.measures.formulas.choices import (
    choices_by_part,
    chosen_in_part,
    positions_at_most,
)
from lm_eval_coupling.samples.logged import LoggedRequest
from lm_eval_coupling.samples.measure import measure_samples

plugin.install()  # The start-up hook is off in tests.
GENERATED = "generated-first+generated-last+generated-spread3"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "model")
    for kind in tiny.KINDS:
        tiny.save_task(folder / "tasks", kind)
    return folder


@pytest.fixture(scope="module")
def lm(home, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("store") / "store.sqlite")
    return CouplingLM(
        pretrained=str(home / "model"),
        device="cpu",
        coupling_ranks="2",
        coupling_store=store,
        coupling_position="generated-last",
    )


def evaluate(home, out, task="tiny_generate", **arguments):
    arguments = {"coupling_ranks": "2", "coupling_limit": 1} | arguments
    _, samples = evaluate_and_log(
        home,
        out,
        model="coupling-hf",
        model_args={
            "pretrained": str(home / "model"),
            "device": "cpu",
            "coupling_store": str(out.parent / f"{out.name}.sqlite"),
        }
        | arguments,
        tasks=[task],
    )
    return load_records(out, places="all"), samples[task]


def by_hand(home, text, after):
    """Measure prompt and response, put together by hand, at every token of the response."""
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    before, behind = (tokenizer.encode(part, add_special_tokens=False) for part in (text, after))
    wrapped = ResidualModel.wrap(model)
    return (
        before,
        behind,
        lambda index: measure_coupling(
            wrapped, [[*before, *behind]], ranks=[2], position=len(before) + index, progress=False
        )[0],
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_values_are_those_of_the_text_put_together_by_hand(home, tmp_path, seed):
    records, samples = evaluate(
        home, tmp_path / "run", coupling_position=GENERATED, coupling_seed=seed
    )
    (sample,) = [s for s in samples if s["doc_hash"] == records.doc_hash[0]]
    ((response,),) = sample["resps"]
    before, behind, measured = by_hand(home, sample["arguments"]["gen_args_0"]["arg_0"], response)
    n = len(behind)
    assert records["part_index"].tolist() == list(dict.fromkeys([0, n - 1, round((n - 1) / 2)]))
    assert set(records.kind) == {"generated"} and set(records.part_length) == {n}
    for row in records.itertuples():
        hand = measured(row.part_index)
        assert list(row.tokens) == [*before, *behind]
        assert row.position == len(before) + row.part_index
        assert np.array_equal(row.normalized_miscoupling, hand.normalized_miscoupling)
        assert np.array_equal(row.singular_values, hand.singular_values)
        assert row.token_text == AutoTokenizer.from_pretrained(home / "model").decode(
            [behind[row.part_index]]
        )
    assert sample["coupling"] == records[records.place == 0].iloc[0].coupling[0]


def test_responses_that_a_hook_changed_while_they_were_written_are_refused(home, tmp_path):
    """One pass over prompt and response, as it is measured, does not run such a hook."""
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + (output.shape[1] == 1)
    )
    lm = CouplingLM(
        pretrained=model,
        tokenizer=str(home / "model"),
        device="cpu",
        coupling_ranks="2",
        coupling_store=str(tmp_path / "store.sqlite"),
    )
    request = LoggedRequest("generate_until", ("Hi there", {"max_gen_toks": 8}), ["what is this?"])
    (prompt,) = continued_prompts(lm, [request], None, ["generated"])
    assert prompt.problem.code == "refused" and "steps of decoding" in prompt.problem.words


def test_samples_give_what_the_run_gives(home, tmp_path):
    position = f"-1+{GENERATED}"
    run, _ = evaluate(home, tmp_path / "run", coupling_position=position, coupling_limit=5)
    options = f"ranks=2,limit=5,position={position},store={tmp_path / 'other'}"
    measure_samples(
        str(home / "model"), tmp_path / "run", tmp_path / "out", coupling=options, device="cpu"
    )
    measured = load_records(tmp_path / "out", places="all")
    order = ["doc_hash", "place"]
    one, other = (frame.sort_values(order).reset_index(drop=True) for frame in (run, measured))
    columns = [*order, "kind", "text", "position", "part_index", "part_length", "token_text"]
    assert one[columns].equals(other[columns]) and len(one) > 5 * 2
    for name in ("normalized_miscoupling", "singular_values"):
        assert all(map(np.array_equal, one[name], other[name]))
    prompts = one[one.place == 0]
    assert set(prompts.kind) == {"context"} and prompts.part_index.isna().all()


def test_the_prompt_beside_responses_is_measured_as_without_them(home, tmp_path):
    alone, _ = evaluate(home, tmp_path / "alone", coupling_limit=4)
    both, _ = evaluate(
        home, tmp_path / "both", coupling_limit=4, coupling_position="-1+generated-last"
    )
    both = both[both.place == 0].reset_index(drop=True)
    assert alone.doc_hash.equals(both.doc_hash) and alone.text.equals(both.text)
    assert all(map(np.array_equal, alone.normalized_miscoupling, both.normalized_miscoupling))


def test_the_gold_continuation_is_measured_at_its_last_token(home, tmp_path):
    records, samples = evaluate(
        home, tmp_path / "run", "tiny_choice", coupling_position="target-last"
    )
    (row,) = records.itertuples()
    (sample,) = [s for s in samples if s["doc_hash"] == row.doc_hash]
    context, gold = sample["arguments"][f"gen_args_{int(sample['target'])}"].values()
    before, behind, measured = by_hand(home, context, gold)
    assert row.kind == "target" and list(row.tokens) == [*before, *behind]
    hand = measured(len(behind) - 1)
    assert np.array_equal(row.normalized_miscoupling, hand.normalized_miscoupling)


def test_tasks_without_a_response_say_so(home, tmp_path, caplog):
    records, _ = evaluate(
        home, tmp_path / "run", "tiny_choice", coupling_position="-1+generated-last"
    )
    reasons = dict(zip(records.place, records.reason, strict=True))
    assert reasons == {
        0: None,
        1: "got a task whose model writes no response, which has no generated part",
    }
    evaluate(home, tmp_path / "alone", "tiny_choice", coupling_position="generated-last")
    assert "none of 1 documents could be measured: got a task whose model writes" in caplog.text


def test_the_reasoning_that_lm_eval_removes_is_measured_in_the_run(home, tmp_path):
    _, plain = evaluate(home, tmp_path / "plain", coupling_limit=1)
    chosen, text, marker = next(
        (sample, text, letter)
        for sample in plain
        for text in sample["resps"][0]
        for letter in text[1:-1]  # lm-eval takes a digit for the id of a token
        if text.count(letter) == 1 and letter.isascii() and letter.isalpha()
    )
    records, samples = evaluate(
        home,
        tmp_path / "run",
        coupling_limit="all",
        coupling_position="reasoning-spread2+answer-last",
        think_end_token=marker,
    )
    ((answer,),) = next(s for s in samples if s["doc_hash"] == chosen["doc_hash"])["resps"]
    assert answer == text.split(marker)[1].lstrip()
    rows = records[(records.doc_hash == chosen["doc_hash"]) & records.reason.isna()]
    assert set(rows.kind) == {"reasoning", "answer"}
    assert set(rows.text) == {chosen["arguments"]["gen_args_0"]["arg_0"] + text}
    reasoning = rows[rows.kind == "reasoning"].iloc[0]
    assert reasoning.part_length == len(text.split(marker)[0].encode())
    options = f"ranks=2,limit=1,position=answer-last,store={tmp_path / 'other'}"
    measure_samples(
        str(home / "model"), tmp_path / "run", tmp_path / "out", coupling=options, device="cpu"
    )
    (reason,) = load_records(tmp_path / "out").reason
    assert f"think_end_token={marker} has removed the reasoning; measure it in the run" in reason


def generating(response, context="Question:", **kwargs):
    resps = [] if response is None else [response]
    return LoggedRequest("generate_until", (context, {"until": ["\n"], **kwargs}), resps)


@pytest.mark.parametrize(
    ("request_", "part", "reason"),
    [
        (generating(""), "generated", "got an empty response, which has no token to measure"),
        (generating(None), "generated", "got a request without a response, expected a text"),
        (generating(3), "generated", "got a request without a response"),
        (generating("yes"), "answer", "got a response without </think>, which has no answer part"),
        (generating("yes</think>"), "answer", "got a response whose answer is empty"),
        (generating("</think>yes"), "reasoning", "got a response whose reasoning is empty"),
        (
            generating("no " * 90, "Q" * 600, max_gen_toks=256),
            "generated",
            "got a prompt of 256 tokens and a response of 270, expected at most 512 together",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(lm, request_, part, reason):
    (prompt,) = continued_prompts(lm, [request_], None, [part])
    assert prompt.problem.code == "no_such_token" and prompt.problem.words.startswith(reason)
    assert prompt.tokens == () and prompt.kind == part


def test_reasoning_and_answer_lie_around_the_last_marker(lm):
    request = generating("why é</think> so</think> yes", max_gen_toks=64)
    reasoning, answer = continued_prompts(lm, [request], None, ["reasoning", "answer"])
    decoded = [
        lm.tokenizer.decode([prompt.tokens[i] for i in prompt.span])
        for prompt in (reasoning, answer)
    ]
    assert decoded == ["why é</think> so", " yes"]
    assert reasoning.tokens == answer.tokens


def test_a_gold_continuation_that_is_not_known_is_one_sentence(lm):
    pair = [LoggedRequest("loglikelihood", (context, " yes")) for context in ("a", "b")]
    for target in ("yes", None, 7):
        (prompt,) = continued_prompts(lm, pair, target, ["target"])
        assert "got 2 continuations, and a target that names none" in prompt.problem.words
    (prompt,) = continued_prompts(lm, [generating("x")], "x", ["target"])
    assert "scores no continuations" in prompt.problem.words


def test_choices_are_split_by_part():
    assert choices_by_part("-1+generated-first+0+generated-spread8") == {
        "prompt": "-1+0",
        "generated": "first+spread8",
    }
    assert chosen_in_part("last+first+spread3", 5) == [4, 0, 2]
    assert chosen_in_part("spread8", 3) == [0, 1, 2] and chosen_in_part("spread1", 9) == [0]
    assert positions_at_most("-1+answer-spread8+target-last") == 10


@pytest.mark.parametrize(
    "wrong", ["generated", "generated-4", "generated-spread0", "answer-middle"]
)
def test_parts_that_cannot_be_read_are_refused(home, wrong):
    with pytest.raises(CouplingError, match=f"got coupling_position={wrong}, expected a token"):
        CouplingLM(pretrained=str(home / "model"), coupling_position=wrong)


def test_a_prompt_by_itself_has_no_response(lm):
    with pytest.raises(CouplingError, match="coupling_position=generated-last for a prompt that"):
        measure_coupling(lm.session.trained.model, [[5, 6, 7]], position="generated-last")


def test_written_tables_are_read_with_their_new_columns(home, tmp_path):
    """Rows of the prompt come first, and lack the columns of the others."""
    records, _ = evaluate(home, tmp_path / "run", coupling_position="-1+generated-spread2")
    assert records.place.tolist() == [0, 1, 2]
    assert records.part_index.tolist()[1:] == [0, records.part_length[2] - 1]
    about = json.loads(next((tmp_path / "run").rglob("results_*.json")).read_text())
    settings = about["config"]["coupling"]["settings"]
    assert settings["position"] == -1 and settings["positions"] == "-1+generated-spread2"
