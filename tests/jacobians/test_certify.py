"""Certificates against float64 autograd, and of Jacobians that are wrong by a known amount."""

import dataclasses
import functools
import math

import cases
import pytest
import torch
from oracles import oracle_by_input
from wrapping import wrapped_once

from lm_eval_coupling import ResidualModel
from lm_eval_coupling.jacobians.certify import (
    TOLERANCE,
    Truth,
    certify,
    certify_each,
    has_finer,
    probe,
    pulled_back,
    pulled_back_each,
    with_probe_pulled_back,
)
from lm_eval_coupling.residual import TrueDtype

CPU = torch.device("cpu")
SEQ, TOKEN = 6, 4
CASES = ["llama", "gpt2", "mixtral", "qwen3-next"]
WAYS = {
    "the whole sequence": {},
    "a step of decoding": {"output_token": TOKEN},
    "the trace": {"output_token": TOKEN, "direction": probe},
}


def traced(wrapped, dtype=torch.float64, seq=SEQ, **options):
    return wrapped.trace(cases.tiny_tokens(seq), dtype, **options).calls


@functools.cache
def expected(model, layer, token=TOKEN, seq=SEQ):
    """Return J [t_in, d_out, d_in] by one backward pass per output coordinate."""
    with TrueDtype(torch.float64):
        rows = oracle_by_input(model, cases.tiny_tokens(seq), layer, token)
    return rows.transpose(0, 1)


def faint(scale, dtype):
    """Return a model whose blocks add ``scale`` times what they did."""
    model = cases.tiny_model("llama", dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(scale)
    return model


def test_directions_are_fixed_and_differ_by_layer():
    stream = torch.zeros(1, 3, 24)
    assert torch.equal(probe(0, stream), probe(0, stream[0, 0]))
    assert not torch.equal(probe(0, stream), probe(1, stream))
    right = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(probe(1, stream.double()), right)
    assert torch.equal(probe(1, stream), right.float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_truth_is_autograds(case, way):
    """By whichever way it is taken, to every input token."""
    model, wrapped = wrapped_once(case, CPU)
    for layer, call in enumerate(traced(wrapped, **WAYS[way])):
        u, J = probe(layer, call.resid_pre), expected(model, layer)
        with call.ready():
            for t_in in range(TOKEN + 1):
                truth = Truth.of(call, TOKEN, t_in)
                assert (truth.derivative - u @ J[t_in]).norm() < 1e-11 * u.norm()
                assert torch.equal(truth.u, u) and truth.finer is None and not truth.is_small
                assert certify(call, J[t_in], TOKEN, t_in) < 1e-10


def test_the_trace_keeps_what_it_pulled_back():
    model, wrapped = wrapped_once("llama", CPU)
    (by_trace, _), (plain, _) = traced(wrapped, **WAYS["the trace"]), traced(wrapped)
    assert by_trace.pullback[0] == TOKEN and plain.pullback is None
    kept = with_probe_pulled_back(plain, TOKEN)
    assert with_probe_pulled_back(kept, TOKEN) is kept
    torch.testing.assert_close(kept.pullback[1][: TOKEN + 1], by_trace.pullback[1][: TOKEN + 1])
    with plain.ready():
        torch.testing.assert_close(kept.pullback[1][2], pulled_back(plain, TOKEN, 2))


WRONG = {
    "another scale": lambda J, right: right * 1.001,
    "transposed": lambda J, right: right.mT,
    "zero": lambda J, right: torch.zeros_like(right),
    "of another token": lambda J, right: J[TOKEN - 1],
    "with the identity": lambda J, right: right + torch.eye(len(right), dtype=right.dtype),
    "one entry off": lambda J, right: right.index_put(
        (torch.tensor(3), torch.tensor(5)), right[3, 5] + 0.1
    ),
    "columns exchanged": lambda J, right: right.roll(1, dims=1),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_jacobian_has_the_error_by_hand(case, how):
    """‖uᵀ(J' − J)‖ / ‖uᵀJ‖, far above what is tolerated in either arithmetic."""
    model, wrapped = wrapped_once(case, CPU)
    for layer, call in enumerate(traced(wrapped)):
        J = expected(model, layer)
        right, wrong = J[TOKEN], WRONG[how](J, J[TOKEN])
        u = probe(layer, call.resid_pre)
        by_hand = float((u @ (wrong - right)).norm() / (u @ right).norm())
        with call.ready():
            error = certify(call, wrong, TOKEN, TOKEN)
        assert error == pytest.approx(by_hand, rel=1e-6)
        assert error > 2 * TOLERANCE[torch.float32] > TOLERANCE[torch.float64]


def test_what_is_not_finite_is_no_number():
    model, wrapped = wrapped_once("llama", CPU)
    (call, _), broken = traced(wrapped), expected(model, 0)[TOKEN].clone()
    for value in (math.nan, math.inf):
        broken[0, 0] = value
        with call.ready():
            assert not certify(call, broken, TOKEN, TOKEN) <= TOLERANCE[torch.float32]


def test_prompts_together_are_certified_as_each_alone():
    """One right, one wrong, one of another length; every way to take the derivatives."""
    (model, wrapped), at = wrapped_once("llama", CPU), [(SEQ, TOKEN), (9, 7), (3, 2)]
    jacobians = torch.stack([expected(model, 0, token, seq)[token] for seq, token in at])
    jacobians[1] *= 1.01
    for keeps_keys in (False, True):
        calls = [
            traced(wrapped, seq=seq, output_token=token if keeps_keys else None)[0]
            for seq, token in at
        ]
        tokens = [token for _, token in at]
        with calls[0].ready():
            errors = certify_each(calls, jacobians, tokens)
            pulled = pulled_back_each(calls, tokens)
            for i, (call, token) in enumerate(zip(calls, tokens, strict=True)):
                alone = certify(call, jacobians[i], token, token)
                assert float(errors[i]) == pytest.approx(alone, rel=1e-6, abs=1e-12)
                torch.testing.assert_close(pulled[i], pulled_back(call, token, token))
        assert errors[1] == pytest.approx(0.01, rel=1e-6) and max(errors[0], errors[2]) < 1e-10


def test_a_small_jacobian_is_compared_in_float64():
    """In float32 the sum with the identity leaves it too few digits."""
    model, exact = faint(1e-6, torch.float32), faint(1e-6, torch.float64)
    wrapped = ResidualModel.wrap(model)
    (call, _), right = traced(wrapped, torch.float32), expected(exact, 0)[TOKEN]
    with call.ready():
        truth = Truth.of(call, TOKEN, TOKEN)
        assert has_finer(call) and truth.is_small and truth.finer.dtype == torch.float64
        assert truth.derivative.dtype == torch.float64
        assert truth.error(right) < 1e-4 < 9e-3 < truth.error(1.01 * right) < 1.1e-2
        assert certify_each([call], right.float()[None], [TOKEN]).isnan().all()


def test_the_floor_is_four_roundings_of_the_identity():
    """What a block adds is lost below it: errors are relative to the floor, not to nothing."""
    model = faint(0, torch.float64)
    wrapped = ResidualModel.wrap(model)
    (call, _) = traced(wrapped)
    with call.ready():
        truth = Truth.of(call, TOKEN, TOKEN)
        assert truth.finer is None and truth.derivative.norm() < truth.lost * truth.u.norm()
        assert truth.lost == 4 * torch.finfo(torch.float64).eps / TOLERANCE[torch.float64]
        wrong = 1e-3 * torch.eye(24, dtype=torch.float64)
        assert certify(call, wrong, TOKEN, TOKEN) == pytest.approx(1e-3 / truth.lost, rel=1e-6)


def test_keys_of_another_prompt_are_seen():
    """A step of decoding that is not the block is not believed: the whole sequence is taken."""
    model, wrapped = wrapped_once("llama", CPU)
    (call, _) = traced(wrapped, **WAYS["a step of decoding"])
    rolled = tuple(torch.roll(kept, 1, dims=-2) for kept in call.keys.batch)
    call = dataclasses.replace(call, keys=dataclasses.replace(call.keys, batch=rolled))
    right = expected(model, 0)[TOKEN]
    with call.ready():
        assert pulled_back_each([call], [TOKEN]).isnan().all()
        assert certify(call, right, TOKEN, TOKEN) < 1e-10


def test_a_wrong_pullback_condemns_a_right_jacobian():
    """The two are compared, whichever of them is wrong."""
    model, wrapped = wrapped_once("llama", CPU)
    (call, _) = traced(wrapped, **WAYS["the trace"])
    token, pulled = call.pullback
    wrong = call.with_pullback(token, 1.01 * pulled)
    with call.ready():
        assert certify(wrong, expected(model, 0)[TOKEN], TOKEN, TOKEN) > 1e-3
