"""A block that adds next to nothing to the stream keeps the digits of its Jacobian."""

import copy
import dataclasses

import cases
import pytest
import torch
from oracles import oracle, worst

from lm_eval_coupling import ResidualModel, block_jacobians
from lm_eval_coupling.jacobians import certify, levels
from lm_eval_coupling.jacobians.certify import probe
from lm_eval_coupling.jacobians.engine import jacobians_of_traces
from lm_eval_coupling.jacobians.tangent import NearIdentity, Origin
from lm_eval_coupling.residual import TrueDtype

OUTPUTS = ("down_proj", "o_proj", "out_proj", "c_proj", "dense_4h_to_h", "attention.dense")
OUTPUTS += ("post_attention_layernorm", "post_feedforward_layernorm")


def faint(case, scale):
    """A float32 model whose blocks add ``scale`` times what those of the family add, and what its
    Jacobians J_tt are.
    """
    model = cases.tiny_model(case, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                any(f"{output}.{what}" in name for output in OUTPUTS for what in ("weight", "bias"))
                or "s.down_proj" in name
            ):
                parameter.mul_(scale)
    twin = copy.deepcopy(model).double()

    def expected(tokens):
        with TrueDtype(torch.float64):
            return [
                oracle(twin, tokens, layer, tokens.shape[1] - 1, tokens.shape[1] - 1)
                for layer in range(2)
            ]

    return ResidualModel.wrap(model), expected


def relative(found, expected):
    """Of next to nothing too."""
    return worst(found.double() / expected.norm(), expected / expected.norm())


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "olmo2", "bloom", "falcon-alibi"])
def test_digits_do_not_go_with_the_identity(case, scale):
    """J was ∂F less 1: its error was 1e-7 at any size, and the certificate's floor hid it."""
    model, expected = faint(case, scale)
    found = block_jacobians(model, cases.tiny_tokens(7))
    for jacobian, right in zip(found.jacobians, expected(cases.tiny_tokens(7)), strict=True):
        assert right.norm() < 0.05 and relative(jacobian, right) < 2e-6
    assert found.method == ["closed"] * 2 and found.why == [None] * 2
    assert 0 < found.certificate.min() and found.certificate.max() < 1e-5


@pytest.mark.parametrize("method", ["token-local", "autodiff"])
@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3-next", "bloom"])
def test_slower_levels_keep_the_digits_too(case, method):
    """They differentiate the block with its identity: relative to J they were off by 1e-2 where J
    is 1e-5.
    """
    model, expected = faint(case, 1e-5)
    if case == "qwen3-next":
        method = "auto"  # its linear attention has one level only
    found = block_jacobians(model, cases.tiny_tokens(7), method=method)
    for jacobian, right in zip(found.jacobians, expected(cases.tiny_tokens(7)), strict=True):
        assert right.norm() < 1e-3 and relative(jacobian, right) < 2e-6
    assert found.jacobians.dtype == torch.float32 and all("in float64" in why for why in found.why)
    assert found.certificate.max() < 1e-5


@pytest.mark.parametrize("case", ["llama", "mixtral", "bloom"])
def test_several_prompts_of_a_faint_model(case):
    """Together as alone, whatever level they come from."""
    model, expected = faint(case, 1e-5)
    prompts, places = [cases.tiny_tokens(seq)[0].tolist() for seq in (5, 9, 70)], [4, 8, 69]
    together = jacobians_of_traces(
        model.traces(prompts, torch.float32, places, probe), places, "auto"
    )
    for tokens, found in zip(prompts, together, strict=True):
        for jacobian, right in zip(found.jacobians, expected(torch.tensor([tokens])), strict=True):
            assert relative(jacobian, right) < 2e-6
        assert found.certificate.max() < 1e-5


def test_certificate_is_relative_to_a_small_jacobian(monkeypatch):
    """An error of a thousandth of J was within the floor where ‖J‖ is 1e-5 of the identity's."""
    right = levels.LEVELS["token-local"]
    model, expected = faint("llama", 1e-5)

    def wrong(call, output_token, input_token, budget):
        identity = torch.eye(24, dtype=call.dtype)
        return (right(call, output_token, input_token, budget) + identity) * (1 + 2e-8) - identity

    monkeypatch.setitem(levels.LEVELS, "token-local", wrong)
    assert (
        block_jacobians(model, cases.tiny_tokens(7), method="token-local").certificate.min() > 1e-4
    )


def test_keys_of_a_faint_block_are_held_to_what_it_adds():
    """A step of decoding was taken for the block where both are next to the identity, whatever they
    add to it.
    """
    model, _ = faint("llama", 1e-6)
    with torch.no_grad():
        (call, *_) = model.traces([cases.tiny_tokens(7)], torch.float32, [6], None)[0].calls
    rolled = dataclasses.replace(
        call.keys, batch=tuple(torch.roll(kept, 1, dims=-2) for kept in call.keys.batch)
    )
    call = dataclasses.replace(call, keys=rolled)
    with call.ready():
        pulled = call.batch_with([]).pull_back_decoding([probe(0, call.resid_pre)], [6])
    assert pulled.isnan().all()


def test_without_float64_the_record_says_so(monkeypatch):
    """Digits are lost on MPS; they are not lost without a word."""
    monkeypatch.setattr(certify, "has_float64", lambda device: False)
    found = block_jacobians(faint("llama", 1e-5)[0], cases.tiny_tokens(7), method="token-local")
    assert all("no float64" in why for why in found.why)
    assert block_jacobians(faint("llama", 1e-5)[0], cases.tiny_tokens(7)).why == [None, None]


def test_near_identities_follow_each_other_as_their_matrices_do():
    """diag + low rank + rest, with any of its parts missing."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = Origin(2, 5)
    kinds = [(), ("low",), ("rest",), ("low", "rest")]
    made = {}
    for parts in kinds:
        low = (some(2, 5, 2), some(2, 5, 2)) if "low" in parts else (None, None)
        made[parts] = NearIdentity(
            root, some(2, 5), *low, some(2, 5, 5) if "rest" in parts else None
        )
    rows, factor = some(2, 3, 5), some(2, 5)
    for a in made.values():
        assert torch.allclose(a.after(rows), rows @ a.matrix())
        assert torch.allclose(a.total(), a.matrix().sum(1))
        assert torch.allclose(
            a.scaled(factor, factor.shape).matrix(), factor[..., None] * a.matrix()
        )
        assert torch.allclose(a.matrix(1.0), a.matrix() - torch.eye(5, dtype=torch.float64))
        for b in made.values():
            assert torch.allclose(a.over(b).matrix(), a.matrix() @ b.matrix())
            assert torch.allclose(
                a.plus(b.left, b.right, b.diagonal, b.rest).matrix(), a.matrix() + b.matrix()
            )
