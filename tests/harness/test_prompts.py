"""The measured tokens are those that HFLM feeds to the model; the oracle is what the model was
called with.
"""

import pytest
import tiny
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lm_eval_coupling.harness.prompts import Prompt, document_prompts


class Fed(HFLM):
    """HFLM that remembers the token ids its model is called with, one request at a time."""

    def _model_call(self, inps, **kwargs):
        self.rows = [*self.rows, *map(tuple, inps.tolist())]
        return super()._model_call(inps, **kwargs)

    def _model_generate(self, context, **kwargs):
        self.rows = [*self.rows, *map(tuple, context.tolist())]
        return super()._model_generate(context, **kwargs)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.continuations = [
            *self.continuations,
            *(tuple(continuation) for _, _, continuation in requests),
        ]
        return super()._loglikelihood_tokens(requests, **kwargs)

    def fed(self, request):
        """Rows the model was called with for one request, and the continuation scored in each."""
        self.rows, self.continuations = [], []
        getattr(self, request.request_type)([request])
        return self.rows, self.continuations

    def context(self, request):
        """The part of what was fed that comes before the continuation, whose last token is never
        fed.
        """
        (row,), (continuation,) = self.fed(request)
        assert (*row, continuation[-1])[-len(continuation) :] == continuation
        return row[: len(row) + 1 - len(continuation)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def lm(folder):
    """Make an HFLM over the tiny model. Tokenizers: ``plain``, ``bos`` (adds one by itself),
    ``merging`` (a and b to ab).
    """
    model = AutoModelForCausalLM.from_pretrained(folder)

    def make(tokenizer="plain", **options):
        chosen = {"plain": _plain, "bos": _bos, "merging": _merging}[tokenizer](folder)
        return Fed(pretrained=model, tokenizer=chosen, batch_size=1, device="cpu", **options)

    return make


def _plain(folder):
    return AutoTokenizer.from_pretrained(folder)


def _bos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 0
    return tokenizer


def _merging(folder):
    """Joins the last letter of one word to the first of the next, as no sane tokenizer does but BPE
    may.
    """
    names = ["<s>", "</s>", "<pad>", *"abcx", "ab"]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def request(kind, *args, idx=0):
    return Instance(request_type=kind, doc={}, arguments=args, idx=idx)


def scored(*pairs):
    return [request("loglikelihood", *pair, idx=i) for i, pair in enumerate(pairs)]


def ids(lm, text):
    return tuple(lm.tokenizer.encode(text, add_special_tokens=False))


TOKENIZERS = pytest.mark.parametrize("tokenizer", ["plain", "bos"])
LONG = "one two three four five six seven eight nine ten"


@TOKENIZERS
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The sky is", " blue"),
        ("The sky is ", "blue"),
        ("The sky is \n ", " blue"),
        ("a", "b"),
        ("<s>The sky", " is"),
        ("", "x y"),
    ],
)
@pytest.mark.parametrize("max_length", [None, 8])
def test_scored_contexts_are_what_is_fed(
    lm, tokenizer, add_bos_token, context, continuation, max_length
):
    lm = lm(tokenizer, add_bos_token=add_bos_token, max_length=max_length)
    (asked,) = scored((context, continuation))
    (prompt,) = document_prompts(lm, [asked], 0)
    if context:
        assert prompt == Prompt(lm.context(asked), "context")
    else:
        (row,), (scored_ids,) = lm.fed(asked)
        assert prompt == Prompt((*row, scored_ids[-1]), "continuation")


def test_spaces_at_the_end_belong_to_the_continuation(lm):
    lm = lm()
    (prompt,) = document_prompts(lm, scored(("The sky is  ", "blue")), 0)
    assert prompt == Prompt(ids(lm, "The sky is"), "context")


@TOKENIZERS
def test_the_other_reading_keeps_the_spaces_at_the_end(lm, tokenizer):
    """A task of choices and one that generates are then measured at the same token of the same
    prompt.
    """
    lm, chat = lm(tokenizer), "<user>Why?\n<assistant>\n"
    choice, generation = (
        scored((chat, " Because")),
        [request("generate_until", chat, {"max_gen_toks": 2})],
    )
    (whole,) = document_prompts(lm, choice, 0, "rendered")
    (fed,), _ = lm.fed(generation[0])
    assert whole.tokens == fed and whole == document_prompts(lm, generation, 0, "rendered")[0]
    assert document_prompts(lm, choice, 0)[0].tokens == whole.tokens[:-1]
    assert document_prompts(lm, generation, 0)[0] == whole


def test_the_other_reading_is_cut_from_the_left_too(lm):
    lm = lm(max_length=16)
    (prompt,) = document_prompts(
        lm, scored((LONG + " ", "eleven"), (LONG + " ", "ten")), 0, "rendered"
    )
    assert prompt.tokens == ids(lm, LONG + " ")[-16:]


def test_bos_is_added_once(lm):
    """By the tokenizer or on demand, but never before a text (a chat template's) that begins with
    it.
    """
    for made in (lm("bos"), lm("plain", add_bos_token=True, max_length=None)):
        for context in ("sky", "<s>sky"):
            for asked in (
                scored((context, " blue")),
                [request("generate_until", context, {"max_gen_toks": 2})],
            ):
                (prompt,) = document_prompts(made, asked, 0)
                assert prompt.tokens.count(0) == (
                    1 if made.tokenizer.encode("a")[0] == 0 or context != "sky" else 0
                )
                assert prompt.tokens[-3:] == ids(made, "sky")


def test_the_beginning_of_a_long_context_is_cut(lm):
    lm = lm(max_length=16)
    asked = scored((LONG, " eleven"))
    (prompt,) = document_prompts(lm, asked, 0)
    assert prompt.tokens == lm.context(asked[0]) == ids(lm, LONG)[-(16 + 1 - len(" eleven")) :]


def test_choices_of_different_lengths_leave_different_contexts(lm):
    """One context in the text, but two after the cut: each is fed, so each is measured."""
    lm = lm(max_length=16)
    asked = scored((LONG, " eleven"), (LONG, " twenty"), (LONG, " ten"))
    assert [len(prompt.tokens) for prompt in document_prompts(lm, asked, 0)] == [10, 13]


def test_a_continuation_as_long_as_the_window_leaves_one_token(lm):
    lm = lm(max_length=7)
    asked = scored((LONG, " eleven"))
    (prompt,) = document_prompts(lm, asked, 0)
    assert prompt.tokens == lm.context(asked[0]) == ids(lm, "n")


def test_a_token_across_the_boundary_is_not_moved(lm):
    """Context `xa` before continuation `bc`: together one would read x·ab·c; what is fed is x·a."""
    lm = lm("merging")
    assert len(ids(lm, "xabc")) == 3
    (asked,) = scored(("xa", "bc"))
    (prompt,) = document_prompts(lm, [asked], 0)
    assert prompt.tokens == lm.context(asked) == ids(lm, "xa")


@TOKENIZERS
@pytest.mark.parametrize("room", [{"max_gen_toks": 4}, {"max_new_tokens": 12}, {"max_tokens": 19}])
@pytest.mark.parametrize("context", ["Name it.", "Name it: ", "<s>Name it", LONG])
def test_generation_contexts_are_what_is_fed(lm, tokenizer, room, context):
    lm = lm(tokenizer, max_length=20)
    asked = request("generate_until", context, {"until": ["\n"]} | room)
    given = dict(asked.args[1])
    (prompt,) = document_prompts(lm, [asked], "it")
    assert asked.args[1] == given
    assert lm.fed(asked)[0] == [prompt.tokens] and prompt.kind == "context"
    assert len(prompt.tokens) <= 20 - next(iter(room.values()))


@TOKENIZERS
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 40])
def test_rolling_texts_are_measured_on_the_last_window(lm, tokenizer, length):
    lm = lm(tokenizer, max_length=16)
    asked = request("loglikelihood_rolling", LONG[:length])
    (prompt,) = document_prompts(lm, [asked], None)
    rows, continuations = lm.fed(asked)
    assert prompt == Prompt((*rows[-1], continuations[-1][-1])[-16:], "window")
    assert prompt.tokens[-min(length, 15) :] == ids(lm, LONG[:length])[-15:]


def test_every_distinct_context_once_in_order(lm):
    lm = lm()
    asked = scored(("It was b", " ."), ("It was a", " ."), ("It was b", " !"), ("It was a ", "?"))
    assert document_prompts(lm, asked, 0) == [
        Prompt(ids(lm, "It was b"), "context"),
        Prompt(ids(lm, "It was a"), "context"),
    ]


def test_unconditional_likelihoods_beside_a_context_are_passed_over(lm):
    lm = lm()
    asked = scored(("Why?", " yes"), ("Why?", " no"), ("", " yes"), ("", " no"))
    assert document_prompts(lm, asked, 1) == [Prompt(ids(lm, "Why?"), "context")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0, "good"),
        (1, "bad"),
        ("1", "bad"),
        ("bad", "bad"),
        (" bad ", "bad"),
        (None, "good"),
        (7, "good"),
        ("?", "good"),
        ("²", "good"),
    ],
)
def test_without_context_the_target_is_measured(lm, target, expected):
    lm = lm()
    found = document_prompts(lm, scored(("", "good"), ("", "bad")), target)
    assert found == [Prompt((0, *ids(lm, expected)), "continuation")]


def test_a_prefix_token_is_not_doubled(lm):
    lm = lm()
    (asked,) = scored(("", "<s>good"))
    (prompt,) = document_prompts(lm, [asked], 0)
    (row,), (continuation,) = lm.fed(asked)
    assert prompt.tokens == (*row, continuation[-1]) == (0, *ids(lm, "good"))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("options", [{}, {"max_length": 40}, {"add_bos_token": True}], ids=str)
def test_whole_tasks(lm, tmp_path, kind, options):
    """Documents as lm-eval builds them: each is measured on the tokens that were fed for it."""
    lm = lm("bos", **options)
    name = tiny.save_task(tmp_path, kind)
    task = TaskManager(include_path=str(tmp_path), include_defaults=False).load([name])["tasks"][
        name
    ]
    task.build_all_requests(limit=2)
    assert task.instances
    for doc_id in {instance.doc_id for instance in task.instances}:
        asked = [instance for instance in task.instances if instance.doc_id == doc_id]
        target = task.doc_to_target(asked[0].doc)
        found = document_prompts(lm, asked, target)
        if kind == "generate":
            expected = [row for instance in asked for row in lm.fed(instance)[0]]
        elif kind == "rolling":
            rows, continuations = lm.fed(asked[0])
            expected = [(*rows[-1], continuations[-1][-1])[-lm.max_length :]]
        elif kind == "blimp":
            (row,), (continuation,) = lm.fed(asked[target])
            expected = [(*row, continuation[-1])]
        else:
            expected = list(dict.fromkeys(lm.context(instance) for instance in asked))
        assert [prompt.tokens for prompt in found] == expected
        if not options.get("max_length"):
            assert len(found) == (2 if kind == "winogrande" else 1)


def test_prompts_are_plain_numbers(lm):
    """They go into JSON keys: no tensors, no NumPy."""
    lm = lm()
    asked = [
        *scored(("Why?", " yes")),
        request("generate_until", "Why?", {}),
        request("loglikelihood_rolling", "Why?"),
    ]
    for prompt in document_prompts(lm, asked, 0):
        assert type(prompt.tokens) is tuple and {type(token) for token in prompt.tokens} == {int}
