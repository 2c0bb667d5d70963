"""What is measured is what the model class feeds to the model; the oracle is the model class itself, watched."""

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from lm_eval_coupling.model import CouplingLM
from lm_eval_coupling.prompts import Prompt, document_prompts


@pytest.fixture(scope="module", params=[{}, {"max_length": 20}, {"add_bos_token": True}], ids=str)
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return CouplingLM(tiny.save_model(folder), device="cpu", batch_size=1, coupling_limit=0, **request.param)


@pytest.fixture
def fed(lm, monkeypatch):
    """Token ids of every call of the model, one row each."""
    seen = []
    right_call, right_generate = lm._model_call, lm._model_generate

    def call(inps, *args, **kwargs):
        seen.extend(map(tuple, inps.tolist()))
        return right_call(inps, *args, **kwargs)

    def generate(context, **kwargs):
        seen.extend(map(tuple, context.tolist()))
        return right_generate(context=context, **kwargs)

    monkeypatch.setattr(lm, "_model_call", call)
    monkeypatch.setattr(lm, "_model_generate", generate)
    return seen


def requests(kind, *arguments):
    return [Instance(kind, {}, args, idx, ("task", 0, 1)) for idx, args in enumerate(arguments)]


CONTINUATIONS = [" red", " green"]
CONTEXTS = ["What colour?", "What colour? ", "A context that is longer than twenty tokens:"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_context_of_choices_is_what_stands_before_them(lm, fed, context):
    asked = requests("loglikelihood", *[(context, c) for c in CONTINUATIONS])
    (prompt,) = [p for p in document_prompts(lm, asked[:1], 0)]
    lm.loglikelihood(asked[:1], disable_tqdm=True)
    (row,) = fed
    scored = lm._encode_pair(context, CONTINUATIONS[0])[1]
    assert prompt.kind == "context"
    assert list(row) == [*prompt.tokens, *scored[:-1]]  # the last token of a continuation is never fed


def test_choices_that_share_a_context_are_one_prompt(lm):
    assert len(document_prompts(lm, requests("loglikelihood", *[("Short:", c) for c in CONTINUATIONS]), 0)) == 1


def test_every_context_of_a_winogrande_document(lm):
    asked = requests("loglikelihood", ("The cat saw", " it."), ("The dog saw", " it."))
    first, second = document_prompts(lm, asked, 0)
    assert lm.tok_decode(list(first.tokens)[-3:]) == lm.tok_decode(list(second.tokens)[-3:]) == "saw"
    assert first.tokens != second.tokens


def test_a_document_without_context_is_its_target(lm, fed):
    asked = requests("loglikelihood", ("", "good one"), ("", "bad one"))
    for target, text in ((0, "good one"), (1, "bad one"), ("bad one", "bad one"), (None, "good one")):
        (prompt,) = document_prompts(lm, asked, target)
        assert prompt.kind == "continuation"
        fed.clear()
        lm.loglikelihood([asked[["good one", "bad one"].index(text)]], disable_tqdm=True)
        assert prompt.tokens[: len(fed[0])] == fed[0]
        assert lm.tok_decode(list(prompt.tokens)[-3:]) == "one"


def test_an_empty_context_beside_others_is_passed_over(lm):
    asked = requests("loglikelihood", ("Short:", " a"), ("", " a"))
    assert [p.kind for p in document_prompts(lm, asked, 0)] == ["context"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_generation_starts_from_the_prompt(lm, fed, context):
    asked = requests("generate_until", (context, {"until": ["\n"], "max_gen_toks": 4}))
    (prompt,) = document_prompts(lm, asked, None)
    lm.generate_until(asked, disable_tqdm=True)
    assert fed == [prompt.tokens]


@pytest.mark.parametrize("text", ["Short text.", "A page that is long enough for more than one window of twenty tokens."])
def test_a_rolling_document_is_its_last_window(lm, fed, text):
    asked = requests("loglikelihood_rolling", (text,))
    (prompt,) = document_prompts(lm, asked, None)
    lm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert prompt.kind == "window"
    assert any(prompt.tokens[:-1][-len(row) :] == row[-len(prompt.tokens) + 1 :] for row in fed)
    assert lm.tok_decode(list(prompt.tokens)[-4:]) == text[-4:]


def test_prompts_are_plain_numbers(lm):
    (prompt,) = document_prompts(lm, requests("loglikelihood", ("A", " b")), 0)
    assert isinstance(prompt, Prompt) and all(type(t) is int for t in prompt.tokens)
    assert not isinstance(prompt.tokens, torch.Tensor)
