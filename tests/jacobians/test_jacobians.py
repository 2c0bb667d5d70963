"""Block Jacobians against a row-by-row float64 oracle and against the unmodified transformers
model, for every family.
"""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from oracles import decoder_layers, oracle, oracle_by_input, worst
from torch.nn import functional as F
from wrapping import wrapped_on, wrapped_once

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians import levels, rules
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.residual import ResidualModel, TrueDtype

PAIRS = {
    1: {0: [0]},
    2: {1: [1, 0], 0: [1]},
    17: {0: [0], 8: [8], 16: [16, 0, 13], 3: [8]},
}  # inputs by output token
# transformers computes norms, softmax and rotary embeddings in float32 whatever the model's dtype,
# and Qwen3-Next's linear
# attention altogether
SHARED_CASTS = 1e-6
LINEAR_ATTENTION_CASTS = 1e-4


@pytest.mark.parametrize("seq", PAIRS)
@pytest.mark.parametrize("case", cases.CASES)
def test_float64_jacobian_is_the_oracles_under_the_same_casts(case, seq, float64_device):
    tokens = cases.tiny_tokens(seq)
    model, wrapped = wrapped_once(case, float64_device)
    for t_out, inputs in PAIRS[seq].items():
        with TrueDtype(torch.float64):
            expected = [
                oracle_by_input(model, tokens, layer, t_out)
                for layer in range(len(decoder_layers(model)))
            ]
        for t_in in inputs:
            found = block_jacobians(
                wrapped, tokens, output_token=t_out, input_token=t_in, dtype=torch.float64
            )
            assert found.method == cases.levels(case)
            for layer, jacobian in enumerate(found.jacobians.cpu()):
                assert worst(jacobian, expected[layer][:, t_in]) < 1e-12, (layer, t_out, t_in)
                assert found.certificate[layer] < 1e-10
                if t_in > t_out:
                    assert not jacobian.any()


@pytest.mark.parametrize("case", cases.CASES)
def test_jacobian_is_the_unmodified_models(case, float64_device):
    model, wrapped = wrapped_once(case, float64_device)
    tokens = cases.tiny_tokens(9)
    found = block_jacobians(wrapped, tokens, output_token=-1, input_token=4, dtype=torch.float64)
    for layer, jacobian in enumerate(found.jacobians.cpu()):
        tolerance = LINEAR_ATTENTION_CASTS if found.method[layer] == "autodiff" else SHARED_CASTS
        assert worst(jacobian, oracle(model, tokens, layer, 8, 4)) < tolerance


@pytest.mark.parametrize("case", ["llama", "gemma2", "bloom", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_arithmetic_whatever_the_weights_dtype(case, dtype, device):
    """Derivatives of bf16 weights are those of the same weights in float32, and the weights are
    left in bf16.
    """
    model = cases.tiny_model(case, dtype).to(device)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = cases.tiny_tokens(9)
    found = block_jacobians(ResidualModel.wrap(model), tokens, dtype=torch.float32)
    assert found.jacobians.dtype == torch.float32 and found.device.type == device.type
    assert all(
        p.dtype == dtype and torch.equal(p, before[name]) for name, p in model.named_parameters()
    )
    twin = copy.deepcopy(model).cpu().double()
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian.cpu().double(), oracle(twin, tokens, layer, 8, 8)) < 2e-5


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon-alibi", "gemma2"])
def test_levels_agree(case, float64_device):
    _, wrapped = wrapped_once(case, float64_device)
    tokens = cases.tiny_tokens(7)
    for t_in in (6, 2):
        found = [
            block_jacobians(wrapped, tokens, input_token=t_in, method=m, dtype=torch.float64)
            for m in levels.LEVELS
        ]
        assert [f.method for f in found] == [[level] * 2 for level in levels.LEVELS]
        for other in found[1:]:
            assert worst(found[0].jacobians, other.jacobians) < 1e-12


def test_tokens_are_mixed_and_causal(float64_device):
    """An earlier token moves a later one, never the reverse."""
    _, wrapped = wrapped_once("llama", float64_device)
    tokens = cases.tiny_tokens(6)
    assert (
        block_jacobians(wrapped, tokens, output_token=5, input_token=2).jacobians.abs().max() > 1e-3
    )
    assert not block_jacobians(wrapped, tokens, output_token=2, input_token=5).jacobians.any()


@pytest.mark.parametrize(
    ("level", "following"), [("closed", "token-local"), ("token-local", "autodiff")]
)
def test_a_broken_level_is_caught_by_its_certificate(monkeypatch, level, following):
    """A wrong Jacobian is never recorded under ``auto``: the layer falls to the next level and says
    so.
    """
    right = levels.LEVELS[level]
    names = list(levels.LEVELS)
    later = {name: levels.LEVELS[name] for name in names[names.index(level) :]}
    monkeypatch.setattr(levels, "LEVELS", later | {level: lambda *args: right(*args) * 1.001})
    of_a_batch = levels.closed_jacobians

    def closed(*args):
        if level != "closed":
            raise rules.NoRule("none today")
        return of_a_batch(*args) * 1.001

    monkeypatch.setattr(levels, "closed_jacobians", closed)
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    tokens = cases.tiny_tokens(5)
    found = block_jacobians(wrapped, tokens)
    assert set(found.method) == {following}
    assert found.certificate.max() < 1e-4
    assert block_jacobians(wrapped, tokens, method=level).certificate.min() > 1e-4


@pytest.mark.parametrize("function", [F.silu, torch.Tensor.__mul__, torch.rsqrt, F.linear])
def test_a_broken_rule_is_caught_by_its_certificate(monkeypatch, function):
    """A single rule off by a tenth is enough, wherever it stands."""
    right = rules.RULES[function]

    def wrong(run, func, value, *args, **kwargs):
        tangent = right(run, func, value, *args, **kwargs)
        return tangent.scaled(torch.tensor(1.1), value.shape)

    for name in [name for name, rule in rules.RULES.items() if rule is right]:
        monkeypatch.setitem(rules.RULES, name, wrong)
    found = block_jacobians(ResidualModel.wrap(cases.tiny_model("llama")), cases.tiny_tokens(5))
    assert set(found.method) == {"token-local"}
    assert found.certificate.max() < 1e-4


def test_a_step_without_a_rule_falls_to_the_next_level(monkeypatch):
    monkeypatch.delitem(rules.RULES, F.silu)
    found = block_jacobians(ResidualModel.wrap(cases.tiny_model("llama")), cases.tiny_tokens(5))
    assert set(found.method) == {"token-local"}


def test_a_level_that_throws_falls_to_the_next(monkeypatch):
    def broken(*args):
        raise RuntimeError("no rule")

    monkeypatch.setitem(levels.LEVELS, "closed", broken)
    monkeypatch.setattr(levels, "closed_jacobians", broken)
    monkeypatch.setitem(levels.LEVELS, "token-local", broken)
    found = block_jacobians(ResidualModel.wrap(cases.tiny_model("gpt2")), cases.tiny_tokens(5))
    assert set(found.method) == {"autodiff"} and set(found.why) == {
        "closed: no rule; token-local: no rule"
    }


def test_layers_can_be_chosen():
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    tokens = cases.tiny_tokens(5)
    every, last = block_jacobians(wrapped, tokens), block_jacobians(wrapped, tokens, layers=[-1])
    assert last.layers == [1]
    assert torch.equal(every.jacobians[1:], last.jacobians)


def test_small_memory_budget_gives_the_same_numbers(monkeypatch, float64_device):
    wrapped = wrapped_on(float64_device, cases.tiny_model("llama"))
    tokens = cases.tiny_tokens(5)
    whole = block_jacobians(wrapped, tokens, dtype=torch.float64)
    monkeypatch.setattr(levels, "BUDGET", 1)
    for method in levels.LEVELS:
        chunked = block_jacobians(wrapped, tokens, dtype=torch.float64, method=method)
        assert worst(chunked.jacobians, whole.jacobians) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_token": 5}, "got token 5 of a prompt of 5 tokens, expected -5 to 4"),
        ({"input_token": -6}, "got token -6"),
        ({"layers": [2]}, "got layers=2, expected a whole number from -2 to 1"),
        (
            {"dtype": torch.bfloat16},
            "got dtype=torch.bfloat16, expected one of torch.float32, torch.float64",
        ),
        (
            {"method": "guess"},
            "got method='guess', expected one of auto, closed, token-local, autodiff",
        ),
    ],
)
def test_bad_input_is_refused(arguments, message):
    _, wrapped = wrapped_once("llama", torch.device("cpu"))
    with pytest.raises(CouplingError, match=message):
        block_jacobians(wrapped, cases.tiny_tokens(5), **arguments)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["text"], r"got \"\['text'\]\" as a prompt, expected its token ids"),
        (
            torch.tensor([[1, 2], [3, 4]]),
            r"int64 of shape \[2, 2\] as the tokens of a prompt, expected the ids",
        ),
        ([True, False], r"bool of shape \[2\] as the tokens"),
        ([1, 99999], "got token id 99999 in a prompt, expected 0 to 60 for this model"),
        ([-1, 2], "got token id -1 in a prompt, expected 0 to 60"),
    ],
)
def test_what_is_no_prompt_is_refused(tokens, message):
    """Two prompts were measured as one; an id beyond the embeddings costs the whole GPU."""
    _, wrapped = wrapped_once("llama", torch.device("cpu"))
    with pytest.raises(CouplingError, match=message):
        block_jacobians(wrapped, tokens)
