"""Blocks of one pass share equal arguments; what is cut from them is cut once."""

import gc
import weakref

import cases
import pytest
import torch

from lm_eval_coupling.jacobians.certify import probe
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.arguments import Arguments, SharedArguments, join_at_tokens
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.keys import Keys, cache_before


def mask(n):
    return torch.full((2, 1, n, n), -1e9).triu(1)


def test_a_kind_of_layer_shares_its_arguments():
    """Gemma's blocks are given one of two masks, and two kinds of angles, in turn."""
    for case, kinds in (("llama", 1), ("gemma2", 2)):
        wrapped = ResidualModel.wrap(cases.tiny_model(case))
        prompts = [cases.tiny_tokens(n)[0].tolist() for n in (9, 5)]
        first, second = wrapped.traces(prompts, torch.float64, [8, 4], probe)
        assert len({id(call.arguments) for call in first.calls}) == kinds
        assert not {id(call.arguments) for call in first.calls} & {
            id(call.arguments) for call in second.calls
        }


@pytest.mark.parametrize(
    "other",
    [
        lambda given: given | {"attention_mask": given["attention_mask"].clone()},
        lambda given: given | {"attention_mask": given["attention_mask"][:1]},
        lambda given: given | {"scale": 2.0},
        lambda given: given | {"scale": True},
        lambda given: {name: value for name, value in given.items() if name != "scale"},
        lambda given: given | {"shared": {}},
    ],
    ids=["another tensor", "a part of it", "number", "type", "missing", "what blocks write to"],
)
def test_what_differs_is_not_shared(other):
    given = {"attention_mask": mask(5), "scale": 1.0}
    shared, changed = SharedArguments(), other(given)
    assert shared.share((), given) is shared.share((), dict(given))
    found = shared.share((), changed)
    assert found is not shared.share((), given)
    assert ("shared" in changed) == (found is not shared.share((), changed))


def test_what_lies_elsewhere_is_brought_once():
    """A mask was moved for each block of another device, so that blocks shared nothing there."""
    shared, given, there = SharedArguments(), mask(5), torch.device("meta")
    brought = shared.move(given, there)
    assert brought.device == there and shared.move(given, there) is brought
    assert shared.move(given[:], there) is brought  # the same piece of memory
    assert shared.move(given, given.device) is given
    assert shared.move(given[:1], there) is not brought
    given.add_(1)
    assert shared.move(given, there) is not brought


def test_where_a_cache_writes_does_not_keep_calls_apart():
    """transformers 5.0 hands blocks the places of their tokens in a cache, which ours has not."""
    each = [
        Arguments((), {"attention_mask": mask(n)[:1], "cache_position": torch.arange(n)})
        for n in (5, 3)
    ]
    found = join_at_tokens(each, [4, 2], [5, 3], [0, 0])
    assert found.kwargs["cache_position"].tolist() == [4] and found.kwargs[
        "attention_mask"
    ].shape == (2, 1, 1, 5)


def test_tokens_and_prompts_are_told_apart():
    whole = Arguments((), {"attention_mask": mask(5), "position_ids": torch.arange(10).view(2, 5)})
    a, b = whole.of_prompt(0, 5, 5), whole.of_prompt(1, 3, 5)
    assert whole.of_prompt(0, 5, 5) is a and whole.of_prompt(0, 4, 5) is not a
    found = join_at_tokens([a, b], [4, 2], [5, 3], [0, 0])
    assert found is join_at_tokens([a, b], [4, 2], [5, 3], [0, 0])
    assert found.kwargs["position_ids"].tolist() == [[4], [7]] and found.kwargs[
        "attention_mask"
    ].shape == (2, 1, 1, 5)
    others = [
        ([a, b], [3, 2], [5, 3], [0, 0]),
        ([a, b], [4, 2], [5, 3], [4, 2]),
        ([a, a], [4, 2], [5, 5], [0, 0]),
    ]
    for of in others:
        again = join_at_tokens(*of)
        alone = [join_at_tokens(*([one] for one in each)) for each in zip(*of, strict=True)]
        assert again is not found
        assert again.kwargs["position_ids"].tolist() == [
            one.kwargs["position_ids"][0].tolist() for one in alone
        ]


def test_memory_is_given_back_at_once():
    """Arguments that held each other would keep a batch's masks until the next collection."""
    gc.collect()
    gc.disable()
    try:
        whole = Arguments((), {"attention_mask": mask(5)})
        a, b = whole.of_prompt(0, 5, 5), whole.of_prompt(1, 5, 5)
        gone = (
            weakref.ref(join_at_tokens([a, b], [4, 3], [5, 5], [0, 0])),
            weakref.ref(whole),
            weakref.ref(a),
        )
        del whole, a, b
        assert [one() for one in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("tokens", [(4, 4, 4), (4, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1)])
def test_keys_of_a_batch_are_those_of_each_prompt(tokens, rows):
    """In one step or one by one, the places before each token agree; those in front are unseen."""
    batch = (torch.randn(3, 2, 5, 4), torch.randn(3, 1, 5, 4))
    together = cache_before([Keys(batch, row, 5) for row in rows], tokens).kept
    apart = cache_before(
        [Keys((batch[0].clone(), batch[1].clone()), row, 5) for row in rows], tokens
    ).kept
    for found, expected, of_all in zip(together, apart, batch, strict=True):
        assert found.shape == expected.shape and found.isfinite().all()
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            own = slice(max(tokens) - token, None)
            assert torch.equal(found[i, :, own], of_all[row, :, :token]) and torch.equal(
                expected[i, :, own], of_all[row, :, :token]
            )


class _Layer(torch.nn.Linear):
    def forward(self, hidden_states, attention_mask=None, cache=None, **others):
        return hidden_states


@pytest.mark.parametrize("positional", range(4))
def test_a_call_is_repeated_with_the_same_arguments_by_position(positional):
    block = Block(0, _Layer(2, 2))
    values = {"hidden_states": torch.ones(1, 3, 2), "attention_mask": None, "cache": 5}
    args = tuple(values.values())[:positional]
    kwargs = dict([*values.items()][positional:]) | {"use_cache": False}
    stream, unnamed, named = block.by_name(args, kwargs)
    assert stream is values["hidden_states"] and "cache" in named and not unnamed
    assert block.as_called(stream, unnamed, named, positional) == (args, kwargs)
