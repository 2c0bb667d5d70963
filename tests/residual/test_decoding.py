"""Derivatives on the way, by a step of decoding, and of the whole block are the same."""

import dataclasses

import cases
import pytest
import torch
from wrapping import tiny, wrapped_on, wrapped_once

from lm_eval_coupling.jacobians.attention_core import AttentionRecord
from lm_eval_coupling.jacobians.certify import probe, pulled_back, pulled_back_each
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel, block_call, tracing
from lm_eval_coupling.residual.arguments import Arguments
from lm_eval_coupling.residual.block_call import CallBatch
from lm_eval_coupling.residual.keys import Cache

TOKENS = cases.tiny_tokens(9)


def test_the_derivative_taken_on_the_way_is_the_one_taken_afterwards(float64_device):
    wrapped = wrapped_on(float64_device, cases.tiny_model("llama"))
    with_token, without = (
        wrapped.trace(TOKENS, torch.float64, 6, probe),
        wrapped.trace(TOKENS, torch.float64),
    )
    assert torch.equal(with_token.resid_final, without.resid_final)
    for on_the_way, afterwards in zip(with_token.calls, without.calls, strict=True):
        assert on_the_way.pullback is not None and afterwards.pullback is None
        with afterwards.ready():
            for pair in ((6, 6), (6, 2), (6, 8), (3, 3)):
                found, expected = pulled_back(on_the_way, *pair), pulled_back(afterwards, *pair)
                assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


NOT_BY_DECODING = {"qwen3-next"}  # linear attention
NOT_TOGETHER = {"falcon-alibi", "mpt", "bloom"}  # ALiBi has one bias for all prompts of a batch


@pytest.mark.parametrize("case", cases.CASES)
def test_the_derivative_of_a_decoding_step_is_that_of_the_whole_block(
    case, monkeypatch, float64_device
):
    """Decode in long prompts with shorter sliding windows; linear attention has all of it."""
    monkeypatch.setattr(tracing, "LONG", 12)
    _, wrapped = wrapped_once(case, float64_device)
    tokens = cases.tiny_tokens(17)
    for token in (0, 8, 16):
        trace, without = (
            wrapped.trace(tokens, torch.float64, token, probe),
            wrapped.trace(tokens, torch.float64),
        )
        assert torch.allclose(trace.resid_final, without.resid_final, rtol=1e-12, atol=1e-12)
        for decoding, whole in zip(trace.calls, without.calls, strict=True):
            assert (decoding.keys is None) != (decoding.pullback is None)
            assert whole.keys is None and whole.pullback is None
            assert (decoding.keys is None) == (case in NOT_BY_DECODING)
            with decoding.ready():
                for pair in [(token, token), (16, 3)]:
                    found, expected = pulled_back(decoding, *pair), pulled_back(whole, *pair)
                    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
                if case != "qwen3-next":  # linear attention has no such core
                    found, expected = (
                        AttentionRecord.of(decoding, token),
                        AttentionRecord.of(whole, token),
                    )
                    same_record(found, expected, token, decoding.keys is not None)


def same_record(found, expected, token, kept):
    """Require the attention core of the sequence, without the keys beyond the token if kept."""
    keys = slice(found.k.shape[1])
    assert found.k.shape[1] == (token + 1 if kept else expected.k.shape[1])
    assert not expected.weights[:, token + 1 :].any()
    for name in ("q", "z"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    for name in ("k", "v", "weights", "slope"):
        assert torch.allclose(
            getattr(found, name), getattr(expected, name)[:, keys], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("case", cases.CASES)
def test_prompts_decoded_together_are_those_done_alone(case, monkeypatch, float64_device):
    """Of different lengths, each at a token of its own, against the whole sequence of each."""
    monkeypatch.setattr(tracing, "LONG", 12)
    _, wrapped = wrapped_once(case, float64_device)
    prompts, tokens = [cases.tiny_tokens(n)[0].tolist() for n in (17, 14, 3)], [16, 9, 0]
    traces = wrapped.traces(prompts, torch.float64, tokens, probe)
    for calls in zip(*(trace.calls for trace in traces), strict=True):
        wholes = [dataclasses.replace(call, keys=None, pullback=None) for call in calls]
        with calls[0].ready():
            if (
                case not in NOT_BY_DECODING | NOT_TOGETHER
            ):  # neither falls back to one prompt at a time
                directions = [probe(call.layer, call.resid_pre) for call in calls]
                assert CallBatch(calls).pull_back_decoding(directions, tokens).isfinite().all()
                assert len(AttentionRecord._by_decoding(calls, tokens).z) == 3 * len(
                    AttentionRecord.of(calls[0], 0).z
                )
            pulled = pulled_back_each(calls, tokens)
            for whole, found, token in zip(wholes, pulled, tokens, strict=True):
                assert torch.allclose(
                    found, pulled_back(whole, token, token), rtol=1e-10, atol=1e-12
                )
            if case != "qwen3-next":
                for whole, found, token in zip(
                    wholes, AttentionRecord.of_each(calls, tokens), tokens, strict=True
                ):
                    same_record(
                        found, AttentionRecord.of(whole, token), token, case not in NOT_BY_DECODING
                    )


def test_a_decoding_step_with_another_output_is_not_believed(monkeypatch):
    """It gives neither certificate nor attention core: the whole sequence does then."""
    monkeypatch.setattr(tracing, "LONG", 12)
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    tokens = cases.tiny_tokens(17)
    expected = block_jacobians(wrapped, tokens, dtype=torch.float64)
    before = block_call.cache_before
    monkeypatch.setattr(
        block_call,
        "cache_before",
        lambda *batch: Cache(tuple(0 * kept for kept in before(*batch).kept)),
    )
    call = wrapped.trace(tokens, torch.float64, 16).calls[1]
    whole = dataclasses.replace(call, keys=None)
    with call.ready():
        assert torch.equal(pulled_back(call, 16, 16), pulled_back(whole, 16, 16))
    found = block_jacobians(wrapped, tokens, dtype=torch.float64)
    assert expected.method == ["closed"] * len(expected.method) and found.method == [
        "autodiff"
    ] * len(found.method)
    assert torch.allclose(found.jacobians, expected.jacobians, rtol=1e-9, atol=1e-12)


def test_what_is_not_run_as_it_was_traced_certifies_nothing(monkeypatch):
    """With other arguments than the trace's, a replay would agree with itself and be wrong."""
    monkeypatch.setattr(tracing, "LONG", 12)
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    call = wrapped.trace(cases.tiny_tokens(17), torch.float64, 16).calls[1]
    turned = {
        name: tuple(part.flip(-2) for part in value) if name == "position_embeddings" else value
        for name, value in call.arguments.kwargs.items()
    }
    other = dataclasses.replace(call, arguments=Arguments(call.arguments.args, turned), keys=None)
    with call.ready():
        assert pulled_back(dataclasses.replace(call, keys=None), 16, 16).isfinite().all()
        assert pulled_back(other, 16, 16).isnan().all()
        assert pulled_back(dataclasses.replace(other, resid_post=None), 16, 16).isfinite().all()


def test_long_prompts_are_measured_as_short_ones(monkeypatch):
    """Alone and padded together with others."""
    wrapped = ResidualModel.wrap(tiny("gemma3"))
    prompts = [cases.tiny_tokens(n)[0].tolist() for n in (17, 14, 3)]
    expected = measure_coupling(wrapped, prompts, ranks=(2,), position=-2, progress=False)
    monkeypatch.setattr(tracing, "LONG", 12)
    for together in (prompts, prompts[:1]):
        assert (
            wrapped.traces(together, torch.float32, [1] * len(together))[0].calls[0].keys
            is not None
        )
        for a, b in zip(
            expected,
            measure_coupling(wrapped, together, ranks=(2,), position=-2, progress=False),
            strict=False,
        ):
            assert b.reason is None and b.certificate.max() < 1e-5 and a.method == b.method
            assert abs(a.coupling(2) - b.coupling(2)) < 1e-5
