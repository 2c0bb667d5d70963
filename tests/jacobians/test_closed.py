"""Level ``closed`` by itself: against float64 autograd, and on blocks that it must get wrong."""

import cases
import pytest
import torch
from oracles import oracle_by_input, worst
from torch import nn
from torch.nn import functional as F

from lm_eval_coupling import ResidualModel, block_jacobians
from lm_eval_coupling.jacobians.attention_core import AttentionRecord, NoAttentionCore
from lm_eval_coupling.jacobians.certify import certify
from lm_eval_coupling.jacobians.closed import (
    closed_jacobian,
    closed_jacobians,
    closed_row,
    input_factors,
    output_factor,
)
from lm_eval_coupling.jacobians.rules import RULES, NoRule
from lm_eval_coupling.residual import TrueDtype

JOINED = ["llama", "gpt2", "gpt-neox", "olmo2"]
CASES = [*JOINED, "bloom"]
LAYERS = range(2)


def traced(wrapped, seq, output_token=None):
    """Return the calls of one prompt; with an output token, blocks keep keys and values."""
    return wrapped.trace(cases.tiny_tokens(seq), torch.float64, output_token).calls


def expected(model, seq, layer, output_token):
    """Return J [t_in, d_out, d_in] by one backward pass per output coordinate."""
    with TrueDtype(torch.float64):
        rows = oracle_by_input(model, cases.tiny_tokens(seq), layer, output_token)
    return rows.transpose(0, 1)


@pytest.mark.parametrize("keeps_keys", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_tokens(case, keeps_keys):
    model, seq, token = cases.tiny_model(case), 5, 3
    wrapped = ResidualModel.wrap(model)
    calls = traced(wrapped, seq, token if keeps_keys else None)
    for layer in LAYERS:
        right = expected(model, seq, layer, token)
        with calls[layer].ready():
            for t_in in range(token + 1):
                found = closed_jacobian(calls[layer], token, t_in, budget=0)
                assert worst(found, right[t_in]) < 1e-12, (layer, t_in)


@pytest.mark.parametrize("case", JOINED)
def test_prompts_together_each_at_its_own_token(case):
    """Lengths and tokens differ, and one call occurs twice."""
    model, at = cases.tiny_model(case), [(4, 3), (9, 5), (1, 0)]
    wrapped = ResidualModel.wrap(model)
    calls = [traced(wrapped, seq) for seq, _ in at]
    for layer in LAYERS:
        chosen = [prompt[layer] for prompt in calls] + [calls[1][layer]]
        with chosen[0].ready():
            found = closed_jacobians(chosen, [token for _, token in at] + [8])
        for (seq, token), jacobian in zip([*at, (9, 8)], found, strict=True):
            assert worst(jacobian, expected(model, seq, layer, token)[token]) < 1e-12


def test_prompts_whose_arguments_differ_are_not_joined():
    """Bloom's slopes of attention come with the prompt's length."""
    wrapped = ResidualModel.wrap(cases.tiny_model("bloom"))
    calls = [traced(wrapped, seq)[0] for seq in (4, 9)]
    with calls[0].ready(), pytest.raises(ValueError, match="cannot be joined"):
        closed_jacobians(calls, [3, 8])


@pytest.mark.parametrize("case", JOINED)
def test_a_row_is_the_product_of_its_factors(case):
    """M = ∂F/∂z once, C = ∂z/∂x for each input token."""
    model, seq, token, inputs = cases.tiny_model(case), 6, 5, [0, 4, 2]
    wrapped = ResidualModel.wrap(model)
    (call, _) = traced(wrapped, seq)
    with call.ready():
        record = AttentionRecord.of(call, token)
        M = output_factor(call, record, token)
        C = input_factors(call, record, token, inputs)
        row = closed_row(call, token, inputs)
    assert M.shape[1] == C.shape[1] == record.z.numel()
    torch.testing.assert_close(M @ C, row)
    for t_in, jacobian in zip(inputs, row, strict=True):
        assert worst(jacobian, expected(model, seq, 0, token)[t_in]) < 1e-12


def test_a_small_block_keeps_its_digits():
    """The identity is left out where it is added: nothing is subtracted from ∂F at the end."""
    model = cases.tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-9)
    wrapped = ResidualModel.wrap(model)
    (call, _) = traced(wrapped, 5)
    with call.ready():
        found = closed_jacobian(call, 4, 4, budget=0)
    right = expected(model, 5, 0, 4)[4]
    assert right.norm() < 1e-6
    # The oracle subtracts the identity and has seven digits left.
    assert (found - right).norm() < 1e-6 * right.norm()


class Identity(nn.Module):
    """An attention that hands its input on."""

    def forward(self, hidden_states, **_):
        return hidden_states, None


def test_a_block_without_attention_is_refused():
    model = cases.tiny_model("llama")
    model.model.layers[0].self_attn = Identity()
    wrapped = ResidualModel.wrap(model)
    call, following = traced(wrapped, 5)
    with call.ready(), pytest.raises(NoAttentionCore):
        closed_jacobian(call, 4, 4, budget=0)
    with following.ready():
        right = expected(model, 5, 1, 4)[4]
        assert worst(closed_jacobian(following, 4, 4, budget=0), right) < 1e-12


def test_a_step_without_a_rule_is_refused(monkeypatch):
    monkeypatch.delitem(RULES, F.silu)
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    (call, _) = traced(wrapped, 5)
    with call.ready(), pytest.raises(NoRule, match="silu"):
        closed_jacobian(call, 4, 4, budget=0)


MIXED = {
    "the mean over tokens": lambda y: y + y.mean(1, keepdim=True),
    "the number of tokens": lambda y: y * y.shape[1],
    "the token before": lambda y: y + torch.cat([y[:, -1:], y[:, :-1]], dim=1),
}


@pytest.mark.parametrize("how", MIXED)
def test_a_block_that_mixes_tokens_outside_attention(how):
    """On one token it is another function: J is wrong, its certificate says so, it is not used."""
    model = cases.tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: MIXED[how](y))
    wrapped = ResidualModel.wrap(model)
    call, right = traced(wrapped, 5)[1], expected(model, 5, 1, 4)[4]
    with call.ready():
        wrong = closed_jacobian(call, 4, 4, budget=0)
        assert worst(wrong, right) > 1e-2
        assert certify(call, wrong, 4, 4) > 1e-2 and certify(call, right, 4, 4) < 1e-12
    found = block_jacobians(wrapped, cases.tiny_tokens(5), dtype=torch.float64)
    assert found.method == ["closed", "autodiff"]
    assert worst(found.jacobians[1], right) < 1e-12
