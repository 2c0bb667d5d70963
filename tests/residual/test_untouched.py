"""What is wrapped stays as it was, bit for bit, whatever goes wrong in between."""

import copy

import cases
import pytest
import torch
from random_weights import with_lora
from wrapping import tiny

from lm_eval_coupling.jacobians.certify import probe
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = cases.tiny_tokens(9)


def behaviour(model):
    """Logits of a left-padded batch and a generation, on the plain model."""
    batch = torch.cat([TOKENS, cases.tiny_tokens(9).flip(1)]).to(model.device)
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
        generated = model.generate(
            batch[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
    return logits, generated


def bits(model):
    return {name: t.detach().clone().view(torch.uint8) for name, t in model.state_dict().items()}


def plain(model):
    """Everything about a model that wrapping could have touched."""
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [
            (n, p.data_ptr(), p.dtype, p.requires_grad) for n, p in model.named_parameters()
        ],
        "training": model.training,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "gemma3", "falcon-alibi"])
def test_the_wrapped_model_stays_as_it_was(case, dtype, device):
    model = tiny(case, dtype).to(device)
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
def test_weights_are_shared(case, float64_device):
    """No second copy, and a change to the model is a change to what is measured."""
    model = cases.tiny_model(case).to(float64_device)
    wrapped = ResidualModel.wrap(model)
    theirs = {p.data_ptr() for p in wrapped.model.parameters()}
    assert all(p.data_ptr() in theirs for p in model.parameters())
    before = wrapped.trace(TOKENS, torch.float64).resid_final
    model.get_input_embeddings().weight.data.mul_(2)
    assert not torch.allclose(wrapped.trace(TOKENS, torch.float64).resid_final, before)


@pytest.mark.parametrize(
    "error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda e: e.__name__
)
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


def test_an_adapter_is_part_of_the_stream_and_stays_as_it_was():
    base = tiny()
    bare = ResidualModel.wrap(copy.deepcopy(base)).trace(TOKENS).resid_final
    model = with_lora(base, ["q_proj", "v_proj", "down_proj"])
    before, logits = plain(model), behaviour(model)
    found = ResidualModel.wrap(model).trace(TOKENS).resid_final
    assert plain(model) == before and all(map(torch.equal, behaviour(model), logits))
    merged = ResidualModel.wrap(model.merge_and_unload()).trace(TOKENS).resid_final
    assert torch.allclose(found, merged, atol=1e-5) and not torch.allclose(found, bare, atol=1e-1)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "phi3"])
def test_nothing_is_drawn(case):
    """TransformerLens cuts joint projections into new layers, whose initialization drew numbers."""
    model = cases.tiny_model(case, torch.float32)
    before = torch.get_rng_state()
    wrapped = ResidualModel.wrap(model)
    assert torch.equal(torch.get_rng_state(), before)
    measure_coupling(
        wrapped, [TOKENS[0].tolist(), TOKENS[0, :5].tolist()], ranks=(2,), progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)
