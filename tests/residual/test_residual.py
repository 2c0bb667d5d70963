"""The bridge on shared weights: what it wraps stays as it was, bit for bit, and what it shows is the model's own stream."""

import copy
import dataclasses

import cases
import pytest
import torch
from oracles import decoder_layers, oracle, worst
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config
from transformers import T5ForConditionalGeneration as T5

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.attention_core import AttentionRecord
from lm_eval_coupling.jacobians.certify import probe, pulled_back, pulled_back_each
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel, TrueDtype
from lm_eval_coupling.residual import model as model_module
from lm_eval_coupling.residual.arguments import Keys
from lm_eval_coupling.residual.block_call import BlockCall

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = cases.tiny_tokens(9)


def tiny(case="llama", dtype=torch.float32, **changes):
    """As lm-eval loads it: with fused attention."""
    attention = "eager" if case in ("gemma2", "falcon-alibi") else "sdpa"  # transformers has no, or another, fused one
    return cases.tiny_model(case, dtype, **{"attn_implementation": attention} | changes)


def behaviour(model):
    """Logits of a left-padded batch and a generation, on the plain model."""
    batch = torch.cat([TOKENS, cases.tiny_tokens(9).flip(1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
        generated = model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    return logits, generated


def bits(model):
    return {name: t.detach().clone().view(torch.uint8) for name, t in model.state_dict().items()}


def plain(model):
    """Everything about a model that wrapping could have touched."""
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(n, p.data_ptr(), p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "training": model.training,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "gemma3", "falcon-alibi"])
def test_the_wrapped_model_stays_as_it_was(case, dtype):
    model = tiny(case, dtype)
    logits, generated = behaviour(model)
    before, weights = plain(model), bits(model)
    wrapped = ResidualModel.wrap(model)
    (found,) = measure_coupling(wrapped, [TOKENS[0].tolist()], ranks=(2,), progress=False)
    assert found.reason is None and 0 < found.coupling(2) < 1
    assert plain(model) == before
    after_logits, after_generated = behaviour(model)
    assert torch.equal(after_logits, logits) and torch.equal(after_generated, generated)
    assert all(torch.equal(now, weights[name]) for name, now in bits(model).items())


@pytest.mark.parametrize("case", cases.CASES)
def test_weights_are_shared(case):
    """No second copy, and a change to the model is a change to what is measured."""
    model = cases.tiny_model(case)
    wrapped = ResidualModel.wrap(model)
    theirs = {p.data_ptr() for p in wrapped.model.parameters()}
    assert all(p.data_ptr() in theirs for p in model.parameters())
    before = wrapped.trace(TOKENS, torch.float64).resid_final
    model.get_input_embeddings().weight.data.mul_(2)
    assert not torch.allclose(wrapped.trace(TOKENS, torch.float64).resid_final, before)


@pytest.mark.parametrize("case", cases.CASES)
def test_the_trace_is_the_models_own_stream(case):
    """Every block's input and output, as hooks on the unmodified model see them."""
    model = cases.tiny_model(case)
    seen = []

    def before(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks = decoder_layers(model)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    trace = ResidualModel.wrap(model).trace(TOKENS, torch.float64)
    found = [call.resid_pre for call in trace.calls] + [trace.resid_final]
    assert len(found) == len(seen) == len(blocks) + 1
    for mine, theirs in zip(found, seen, strict=True):
        assert mine.dtype == torch.float64 and not mine.requires_grad
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()  # transformers' casts to float32
    assert torch.equal(trace.trajectory(3), torch.stack([x[0, 3] for x in found]))


def test_bfloat16_weights_are_traced_in_full_precision():
    """The stream is that of the same weights in the arithmetic asked for, without the rounding of bf16."""
    model = tiny(dtype=torch.bfloat16)
    upcast = copy.deepcopy(model).float()
    for dtype in (torch.float32, torch.float64):
        found, expected = (ResidualModel.wrap(m).trace(TOKENS, dtype).resid_final for m in (model, upcast))
        assert found.dtype == dtype and torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_one_block_is_upcast_at_a_time():
    wrapped = ResidualModel.wrap(tiny(dtype=torch.bfloat16, num_hidden_layers=3))
    seen = []

    def look(module, args):
        seen.append([{p.dtype for p in block.parameters()} for block in wrapped.blocks])

    inner = [next(m for m in block.modules() if m is not block and not list(m.children())) for block in wrapped.blocks]
    handles = [module.register_forward_pre_hook(look) for module in inner]
    wrapped.trace(TOKENS, torch.float32)
    for handle in handles:
        handle.remove()
    half, full = {torch.bfloat16}, {torch.float32}
    assert seen == [[full if i == j else half for j in range(3)] for i in range(3)]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("derivatives", [False, True])
def test_an_exception_inside_a_block_leaves_nothing_behind(error, derivatives):
    model = tiny(dtype=torch.bfloat16)
    before, weights, (logits, generated) = plain(model), bits(model), behaviour(model)
    wrapped = ResidualModel.wrap(model)
    expected = block_jacobians(wrapped, TOKENS).jacobians
    twin = plain(wrapped.model)

    def fail(module, args, output):
        raise error("in the middle")

    inner = [m for m in wrapped.blocks[1].modules() if not list(m.children())][-1]
    handle = inner.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        wrapped.trace(TOKENS, torch.float32, 4 if derivatives else None, probe)
    handle.remove()
    assert plain(model) == before and plain(wrapped.model) == twin
    assert all(torch.equal(now, weights[name]) for name, now in bits(model).items())
    assert torch.is_grad_enabled()
    assert torch.equal(block_jacobians(wrapped, TOKENS).jacobians, expected)
    assert all(map(torch.equal, behaviour(model), (logits, generated)))


def test_an_exception_inside_a_derivative_puts_the_weights_back():
    model = tiny(dtype=torch.bfloat16)
    weights = bits(model)
    wrapped = ResidualModel.wrap(model)
    call = wrapped.trace(TOKENS, torch.float32).calls[1]
    with pytest.raises(RuntimeError, match="in the middle"), call.ready():
        assert {p.dtype for p in call.module.parameters()} == {torch.float32}
        raise RuntimeError("in the middle")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(now, weights[name]) for name, now in bits(model).items())


def test_float64_is_float64_throughout():
    """transformers computes norms, softmax and rotary embeddings in float32 whatever is asked: not here, nor afterwards."""
    model = cases.tiny_model("llama")
    with torch.no_grad():
        casting = model.model(TOKENS, output_hidden_states=True).hidden_states[1]
    wrapped = ResidualModel.wrap(model)
    found = wrapped.trace(TOKENS, torch.float64).calls[1].resid_pre
    difference = ((found - casting).norm() / casting.norm()).item()
    assert 1e-10 < difference < 1e-6
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32


def test_blocks_can_be_called_again():
    wrapped = ResidualModel.wrap(tiny("gemma2"))  # TransformerLens' blocks do not outlive their bridge
    for call in (trace := wrapped.trace(TOKENS)).calls:
        with torch.no_grad(), call.ready():
            again = call(call.resid_pre)
        after = trace.calls[call.layer + 1].resid_pre if call.layer + 1 < len(trace.calls) else trace.resid_final
        assert torch.equal(again, after)


def test_the_derivative_taken_on_the_way_is_the_one_taken_afterwards():
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    with_token, without = wrapped.trace(TOKENS, torch.float64, 6, probe), wrapped.trace(TOKENS, torch.float64)
    assert torch.equal(with_token.resid_final, without.resid_final)
    for on_the_way, afterwards in zip(with_token.calls, without.calls, strict=True):
        assert on_the_way.pullback is not None and afterwards.pullback is None
        with afterwards.ready():
            for pair in ((6, 6), (6, 2), (6, 8), (3, 3)):
                found, expected = pulled_back(on_the_way, *pair), pulled_back(afterwards, *pair)
                assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


NOT_BY_DECODING = {"falcon-alibi", "mpt", "bloom", "gpt2", "qwen3-next"}  # ALiBi, an unnamed cache, linear attention


@pytest.mark.parametrize("case", cases.CASES)
def test_the_derivative_of_a_decoding_step_is_that_of_the_whole_block(case, monkeypatch):
    """In long prompts, with sliding windows shorter than them; where it is another, the whole block is differentiated."""
    monkeypatch.setattr(model_module, "_LONG", 12)
    wrapped = ResidualModel.wrap(cases.tiny_model(case))
    tokens = cases.tiny_tokens(17)
    for token in (0, 8, 16):
        trace, without = wrapped.trace(tokens, torch.float64, token, probe), wrapped.trace(tokens, torch.float64)
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
                    found, expected = AttentionRecord.of(decoding, token), AttentionRecord.of(whole, token)
                    same_record(found, expected, token, decoding.keys is not None)


def same_record(found, expected, token, kept):
    """The attention core is that of the whole sequence; where keys were kept, without those beyond the token."""
    keys = slice(found.k.shape[1])
    assert found.k.shape[1] == (token + 1 if kept else expected.k.shape[1])
    assert not expected.weights[:, token + 1 :].any()
    for name in ("q", "z"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    for name in ("k", "v", "weights", "slope"):
        assert torch.allclose(getattr(found, name), getattr(expected, name)[:, keys], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", cases.CASES)
def test_prompts_decoded_together_are_those_done_alone(case, monkeypatch):
    """Of different lengths, each at a token of its own, against the whole sequence of each."""
    monkeypatch.setattr(model_module, "_LONG", 12)
    wrapped = ResidualModel.wrap(cases.tiny_model(case))
    prompts, tokens = [cases.tiny_tokens(n)[0].tolist() for n in (17, 14, 3)], [16, 9, 0]
    traces = wrapped.traces(prompts, torch.float64, tokens, probe)
    for calls in zip(*(trace.calls for trace in traces), strict=True):
        wholes = [dataclasses.replace(call, keys=None, pullback=None) for call in calls]
        with calls[0].ready():
            if case not in NOT_BY_DECODING:  # neither falls back to one prompt at a time
                directions = [probe(call.layer, call.resid_pre) for call in calls]
                assert BlockCall.pulled_back_decoding(calls, directions, tokens).isfinite().all()
                assert len(AttentionRecord._by_decoding(calls, tokens).z) == 3 * len(AttentionRecord.of(calls[0], 0).z)
            pulled = pulled_back_each(calls, tokens)
            for whole, found, token in zip(wholes, pulled, tokens, strict=True):
                assert torch.allclose(found, pulled_back(whole, token, token), rtol=1e-10, atol=1e-12)
            if case != "qwen3-next":
                for whole, found, token in zip(wholes, AttentionRecord.of_each(calls, tokens), tokens, strict=True):
                    same_record(found, AttentionRecord.of(whole, token), token, case not in NOT_BY_DECODING)


def test_a_decoding_step_with_another_output_is_not_believed(monkeypatch):
    """Neither as certificate nor as attention core: the block is then done from its whole sequence."""
    monkeypatch.setattr(model_module, "_LONG", 12)
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    tokens = cases.tiny_tokens(17)
    expected = block_jacobians(wrapped, tokens, dtype=torch.float64)
    before = Keys.before_each
    monkeypatch.setattr(Keys, "before_each", lambda *batch: Keys(tuple(0 * kept for kept in before(*batch).kept)))
    call = wrapped.trace(tokens, torch.float64, 16).calls[1]
    whole = dataclasses.replace(call, keys=None)
    with call.ready():
        assert torch.equal(pulled_back(call, 16, 16), pulled_back(whole, 16, 16))
    found = block_jacobians(wrapped, tokens, dtype=torch.float64)
    assert expected.method == ["closed"] * len(expected.method) and found.method == ["autodiff"] * len(found.method)
    assert torch.allclose(found.jacobians, expected.jacobians, rtol=1e-9, atol=1e-12)


def test_long_prompts_are_measured_as_short_ones(monkeypatch):
    """Alone and padded together with others."""
    wrapped = ResidualModel.wrap(tiny("gemma3"))
    prompts = [cases.tiny_tokens(n)[0].tolist() for n in (17, 14, 3)]
    expected = measure_coupling(wrapped, prompts, ranks=(2,), position=-2, progress=False)
    monkeypatch.setattr(model_module, "_LONG", 12)
    for together in (prompts, prompts[:1]):
        assert wrapped.traces(together, torch.float32, [1] * len(together))[0].calls[0].keys is not None
        for a, b in zip(
            expected, measure_coupling(wrapped, together, ranks=(2,), position=-2, progress=False), strict=False
        ):
            assert b.reason is None and b.certificate.max() < 1e-5 and a.method == b.method
            assert abs(a.coupling(2) - b.coupling(2)) < 1e-5


@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_facts(case):
    """Phi-3's joint projections are split by the bridge, and still counted once."""
    model = tiny(case, num_hidden_layers=3)
    wrapped = ResidualModel.wrap(model)
    assert (wrapped.n_layers, wrapped.d_model, wrapped.dtype) == (3, 24, torch.float32)
    assert wrapped.n_params == sum(p.numel() for p in model.parameters())


def test_training_mode_after_wrapping_does_not_reach_the_measurement():
    model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    wrapped = ResidualModel.wrap(model)
    expected = wrapped.trace(TOKENS).resid_final
    model.train()
    assert torch.equal(wrapped.trace(TOKENS).resid_final, expected)


def test_attention_that_the_bridge_computes_otherwise_goes_by_the_models_own_blocks():
    """TransformerLens' Falcon adds the ALiBi bias as transformers' eager one does: another function than the fused one."""
    model = cases.tiny_model("falcon-alibi", torch.float64, attn_implementation="sdpa")
    wrapped = ResidualModel.wrap(model)
    assert wrapped.way == "blocks" and "bridge of FalconForCausalLM is off by" in wrapped.way_reason
    found = block_jacobians(wrapped, TOKENS, dtype=torch.float64)
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian, oracle(model, TOKENS, layer, 8, 8)) < 1e-6


def adapted(base):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model


def test_an_adapter_is_part_of_the_stream_and_stays_as_it_was():
    base = tiny()
    bare = ResidualModel.wrap(copy.deepcopy(base)).trace(TOKENS).resid_final
    model = adapted(base)
    before, logits = plain(model), behaviour(model)
    found = ResidualModel.wrap(model).trace(TOKENS).resid_final
    assert plain(model) == before and all(map(torch.equal, behaviour(model), logits))
    merged = ResidualModel.wrap(model.merge_and_unload()).trace(TOKENS).resid_final
    assert torch.allclose(found, merged, atol=1e-5) and not torch.allclose(found, bare, atol=1e-1)


def bert():
    return BertModel(
        BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def t5():
    return T5(T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=24, num_layers=2, num_heads=4))


def headless():
    return LlamaModel(LlamaConfig(**cases._COMMON | cases._LLAMA_LIKE))


def packed():
    model = tiny()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


def on_no_device():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**cases._COMMON | cases._LLAMA_LIKE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "got a BertModel"),
        (t5, "got a T5ForConditionalGeneration, expected a decoder-only"),
        (headless, "got a LlamaModel without a language-model head"),
        (packed, "layers.0.mlp.up_proj.weight packed as torch.int8"),
        (on_no_device, "embed_tokens.weight on no device"),
        (lambda: torch.nn.Linear(2, 2), "got a Linear, expected a decoder-only transformers language model"),
    ],
    ids=["encoder", "encoder-decoder", "no head", "packed", "meta", "no transformer"],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(make, message):
    with pytest.raises(CouplingError, match=message) as caught:
        ResidualModel.wrap(make())
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("case", cases.CASES)
def test_logits_of_the_last_stream_are_the_models_own(case):
    """Final norm, scales, soft-caps and head are whatever the unmodified model does; blocks work as before afterwards."""
    model, tokens = cases.tiny_model(case), cases.tiny_tokens(9)
    wrapped = ResidualModel.wrap(model)
    for _ in range(2):
        found = wrapped.logits(wrapped.trace(tokens).resid_final[0])
        expected = model(tokens, use_cache=False).logits[0]
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_logits_in_the_dtype_asked_for():
    model = cases.tiny_model("llama", torch.bfloat16)
    wrapped = ResidualModel.wrap(model)
    resid = wrapped.trace(cases.tiny_tokens(5), torch.float64).resid_final[0]
    found, expected = wrapped.logits(resid), cases.tiny_model("llama", torch.bfloat16).double()
    assert found.dtype == torch.float64 and model.lm_head.weight.dtype == torch.bfloat16
    with TrueDtype(torch.float64):
        normed = expected.model.norm(resid)
    assert torch.allclose(found, normed @ expected.lm_head.weight.T, rtol=1e-12)
