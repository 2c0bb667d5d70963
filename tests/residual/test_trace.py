"""What a wrapped model shows is the model's own stream, in the arithmetic that is asked for."""

import copy

import cases
import pytest
import torch
from oracles import decoder_layers, oracle, worst
from wrapping import tiny, wrapped_on, wrapped_once

from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.residual import ResidualModel, TrueDtype

TOKENS = cases.tiny_tokens(9)


@pytest.mark.parametrize("case", cases.CASES)
def test_the_trace_is_the_models_own_stream(case, float64_device):
    """Every block's input and output, as hooks on the unmodified model see them."""
    model, wrapped = wrapped_once(case, float64_device)
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
    trace = wrapped.trace(TOKENS, torch.float64)
    found = [x.cpu() for x in (*(call.resid_pre for call in trace.calls), trace.resid_final)]
    assert len(found) == len(seen) == len(blocks) + 1
    for mine, theirs in zip(found, seen, strict=True):
        assert mine.dtype == torch.float64 and not mine.requires_grad
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()  # transformers' casts to float32
    assert torch.equal(trace.trajectory(3).cpu(), torch.stack([x[0, 3] for x in found]))


def test_bfloat16_weights_are_traced_in_full_precision(float64_device):
    """The stream has the requested arithmetic on the same weights, without the rounding of bf16."""
    model = tiny(dtype=torch.bfloat16)
    upcast = copy.deepcopy(model).float()
    for dtype in (torch.float32, torch.float64):
        found, expected = (
            wrapped_on(float64_device, m).trace(TOKENS, dtype).resid_final for m in (model, upcast)
        )
        assert found.dtype == dtype and torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_one_block_is_upcast_at_a_time(device):
    wrapped = wrapped_on(device, tiny(dtype=torch.bfloat16, num_hidden_layers=3))
    seen = []

    def look(module, args):
        seen.append([{p.dtype for p in block.parameters()} for block in wrapped.blocks])

    inner = [
        next(m for m in block.modules() if m is not block and not list(m.children()))
        for block in wrapped.blocks
    ]
    handles = [module.register_forward_pre_hook(look) for module in inner]
    wrapped.trace(TOKENS, torch.float32)
    for handle in handles:
        handle.remove()
    half, full = {torch.bfloat16}, {torch.float32}
    assert seen == [[full if i == j else half for j in range(3)] for i in range(3)]


def test_float64_is_float64_throughout(float64_device):
    """transformers computes norms, softmax and rotary tables in float32; float64 traces do not."""
    model = cases.tiny_model("llama")
    with torch.no_grad():
        casting = model.model(TOKENS, output_hidden_states=True).hidden_states[1]
    found = wrapped_on(float64_device, model).trace(TOKENS, torch.float64).calls[1].resid_pre.cpu()
    difference = ((found - casting).norm() / casting.norm()).item()
    assert 1e-10 < difference < 1e-6
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32


def test_blocks_can_be_called_again(device):
    wrapped = wrapped_on(
        device, tiny("gemma2")
    )  # TransformerLens' blocks do not outlive their bridge
    for call in (trace := wrapped.trace(TOKENS)).calls:
        with torch.no_grad(), call.ready():
            again = call(call.resid_pre)
        after = (
            trace.calls[call.layer + 1].resid_pre
            if call.layer + 1 < len(trace.calls)
            else trace.resid_final
        )
        assert torch.equal(again, after)


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
    """TransformerLens' Falcon adds the ALiBi bias as the eager one does, unlike the fused one."""
    model = cases.tiny_model("falcon-alibi", torch.float64, attn_implementation="sdpa")
    wrapped = ResidualModel.wrap(model)
    assert (
        wrapped.wrapping == "blocks"
        and "bridge of FalconForCausalLM is off by" in wrapped.wrapping_reason
    )
    found = block_jacobians(wrapped, TOKENS, dtype=torch.float64)
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian, oracle(model, TOKENS, layer, 8, 8)) < 1e-6


@pytest.mark.parametrize("case", cases.CASES)
def test_logits_of_the_last_stream_are_the_models_own(case, float64_device):
    """Final norm, scales, soft-caps and head are the model's; blocks work as before afterwards."""
    model, wrapped = wrapped_once(case, float64_device)
    tokens = cases.tiny_tokens(9)
    for _ in range(2):
        found = wrapped.logits(wrapped.trace(tokens).resid_final[0]).cpu()
        expected = model(tokens, use_cache=False).logits[0]
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_logits_in_the_dtype_asked_for(float64_device):
    model = cases.tiny_model("llama", torch.bfloat16).to(float64_device)
    wrapped = ResidualModel.wrap(model)
    resid = wrapped.trace(cases.tiny_tokens(5), torch.float64).resid_final[0]
    found, expected = wrapped.logits(resid), copy.deepcopy(model).double()
    assert found.dtype == torch.float64 and model.lm_head.weight.dtype == torch.bfloat16
    with TrueDtype(torch.float64):
        normed = expected.model.norm(resid)
    assert torch.allclose(found, normed @ expected.lm_head.weight.T, rtol=1e-12)
