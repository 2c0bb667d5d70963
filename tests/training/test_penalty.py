"""The penalty: its value is measured, its gradient that of finite differences."""

import math

import cases
import pytest
import torch

from lm_eval_coupling import block_jacobians
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel, TrueDtype
from lm_eval_coupling.residual.scored import evaluation_mode
from lm_eval_coupling.training import coupling_penalty
from lm_eval_coupling.training.penalty import coupling_in_bases, fixed_bases
from lm_eval_coupling.training.token_jacobians import token_jacobians

SEQ, RANK = 7, 3
FAMILIES = ["llama", "gpt2", "qwen3", "gpt-neox", "mistral", "gemma2", "phi3"]


def model_of(case, dtype=torch.float64, **changes):
    return cases.tiny_model(case, dtype, **changes)


@pytest.fixture(scope="module")
def ids():
    return cases.tiny_tokens(SEQ)[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", FAMILIES)
def test_jacobians_are_those_that_are_measured(case, implementation, ids):
    model = model_of(case)
    expected = block_jacobians(
        ResidualModel.wrap(model), ids[None], dtype=torch.float64, method="autodiff"
    ).jacobians
    if implementation == "sdpa" and case == "gemma2":
        pytest.skip("transformers has no such attention for it")
    model.set_attn_implementation(implementation)
    with evaluation_mode(model), TrueDtype(torch.float64):
        found = token_jacobians(model, ids)
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("form", "reading"), [("rotated", "rotated"), ("raw", "coupling")])
def test_the_value_is_the_measured_one(form, reading, ids):
    model = model_of("llama")
    found = coupling_penalty(model, ids[None, :2], rank=RANK, form=form)
    (record,) = measure_coupling(
        ResidualModel.wrap(model), [ids[:2].tolist()], ranks=[RANK], dtype="float64", progress=False
    )
    assert float(found) == pytest.approx(readings()[reading].read(record, RANK), abs=1e-6)


@pytest.mark.parametrize("form", ["rotated", "raw"])
def test_a_jacobian_without_numbers_gives_no_number(form):
    J = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    bases = fixed_bases(J, 2)
    J[1, 0, 0] = math.nan
    assert coupling_in_bases(J, bases, form).isnan()


@pytest.mark.parametrize("form", ["rotated", "raw"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_gradient_is_that_of_finite_differences(case, form, ids):
    """Bases held fixed, every weight moved along a random direction; embeddings and norms too."""
    with TrueDtype(torch.float64):
        assert_gradient(model_of(case).requires_grad_(True).eval(), case, form, ids)


def assert_gradient(model, case, form, ids):
    J = token_jacobians(model, ids)
    bases = fixed_bases(J, RANK)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        coupling_in_bases(J, bases, form), parameters, allow_unused=True
    )
    generator = torch.Generator().manual_seed(1)
    for only in ("", "embed" if case == "llama" else "wte"):
        directions = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) * (only in name)
            for name, p in zip(names, parameters, strict=True)
        ]
        expected = sum(
            float((g * v).sum())
            for g, v in zip(gradients, directions, strict=True)
            if g is not None
        )
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                for p, v in zip(parameters, directions, strict=True):
                    p += h * v
            values.append(float(coupling_in_bases(token_jacobians(model, ids), bases, form)))
            with torch.no_grad():
                for p, v in zip(parameters, directions, strict=True):
                    p -= h * v
        found = (values[0] - values[1]) / 2e-5
        assert abs(expected) > 1e-4
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)


def hooks_of(model):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]


def test_nothing_of_the_training_changes(ids):
    """Modes, random state, gradients, hooks; with dropout and gradient checkpointing on."""
    model = model_of("gpt2", torch.float32, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    model.gradient_checkpointing_enable()
    frozen = model.transformer.h[0].mlp.eval()
    before, hooks = torch.get_rng_state(), hooks_of(model)
    values = {float(coupling_penalty(model, ids[None], rank=RANK, seed=3)) for _ in range(2)}
    assert len(values) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not frozen.training and model.transformer.h[1].mlp.training
    assert all(p.grad is None for p in model.parameters())
    assert hooks_of(model) == hooks


def test_training_with_it_moves_coupling_both_ways(ids):
    ends = {}
    for strength in (-1.0, 1.0):
        torch.manual_seed(0)
        model = model_of("llama", torch.float32).requires_grad_(True).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        start = float(coupling_penalty(model, ids[None], rank=RANK, tokens=4))
        for step in range(12):
            optimizer.zero_grad()
            (
                strength * coupling_penalty(model, ids[None], rank=RANK, tokens=2, seed=step)
            ).backward()
            optimizer.step()
        ends[strength] = float(coupling_penalty(model, ids[None], rank=RANK, tokens=4))
    assert ends[1.0] < start - 0.02 < start + 0.02 < ends[-1.0]


def test_padding_is_left_out_and_first_tokens_are_not_drawn(ids):
    model = model_of("llama")
    left = torch.cat([torch.zeros(4, dtype=ids.dtype), ids])[None]
    mask = torch.tensor([[0] * 4 + [1] * SEQ])
    for seed in range(5):
        padded = coupling_penalty(model, left, attention_mask=mask, rank=RANK, seed=seed)
        alone = coupling_penalty(model, ids[None], rank=RANK, seed=seed)
        assert float(padded) == pytest.approx(float(alone), abs=1e-12)


def test_autocast_and_bfloat16_are_computed(ids):
    model = model_of("llama", torch.float32)
    expected = float(coupling_penalty(model, ids[None], rank=RANK))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(coupling_penalty(model, ids[None], rank=RANK)) == expected
    low = float(coupling_penalty(model.bfloat16(), ids[None], rank=RANK))
    assert low == pytest.approx(expected, abs=0.1)


def test_blocks_of_no_effect_do_not_make_the_loss_nan(ids):
    model = model_of("gpt2").requires_grad_(True)
    for block in model.transformer.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(layer.weight)
    for form in ("rotated", "raw"):
        value = coupling_penalty(model, ids[None], rank=RANK, form=form)
        value.backward()
        assert float(value) == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_is_refused(ids):
    model = model_of("llama")
    for options, message in (
        ({"rank": 1}, "got rank=1"),
        ({"rank": 25}, "k = 25 singular triplets"),
        ({"tokens": 0}, "got tokens=0"),
    ):
        with pytest.raises(CouplingError, match=message):
            coupling_penalty(model, ids[None], **options)
    with pytest.raises(Exception, match="bent"):
        coupling_penalty(model, ids[None], form="bent")
    with pytest.raises(CouplingError, match="fewer than two tokens"):
        coupling_penalty(model, ids[None, :1])
    with pytest.raises(CouplingError, match="use a decoder such as Llama"):
        coupling_penalty(model_of("bloom"), ids[None], rank=RANK)
    assert not any(hooks_of(model))
