"""What a tape records of a run, and what it refuses to differentiate."""

import pytest
import torch
from torch.nn import functional as F

from lm_eval_coupling.jacobians.rules import NoRule
from lm_eval_coupling.jacobians.tangent import NearIdentity, Origin
from lm_eval_coupling.jacobians.tape import Tape

W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def taped(function, core=lambda *parts: None):
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tape = Tape(core)
    tape.watch(x, NearIdentity.identity(Origin(*x.shape), x))
    with tape:
        return tape, function(x)


def test_only_what_depends_on_the_variable_is_recorded():
    constant = torch.ones(4, dtype=torch.float64)
    tape, _ = taped(lambda x: F.linear(constant * 2 + 1, W) * x)
    assert [step.function.__name__ for step in tape.steps] == ["mul"]


def test_steps_beside_the_way_need_no_rule():
    """A norm may compute what only its hook looks at, by steps without rules."""

    def function(x):
        torch.cumsum(x, -1).median()
        return F.linear(x, W)

    tape, y = taped(function)
    assert torch.equal(tape.differentiate(y).matrix, W)


def test_tangents_go_with_their_last_use():
    tape, y = taped(lambda x: F.linear(F.silu(F.linear(x, W)), W))
    tape.differentiate(y)
    assert list(tape.tangents) == [id(y)]


def test_a_tensor_changed_after_its_use_is_refused():
    def function(x):
        y = x * 2
        z = y.square()
        y.mul_(3)
        return z

    with pytest.raises(NoRule, match="changed in place after it had been used"):
        tape, z = taped(function)
        tape.differentiate(z)


@pytest.mark.parametrize("how", ["detach", "NumPy", "constant"])
def test_an_outcome_without_the_token_is_refused(how):
    """A detached tensor is another tensor, of whose origin nothing is known."""
    functions = {
        "detach": lambda x: (x * 2).detach(),
        "NumPy": lambda x: torch.from_numpy((x * 2).numpy() * 1),
        "constant": lambda x: torch.ones(4),
    }
    with pytest.raises(NoRule, match=r"does not depend on the token|no rule for"):
        tape, y = taped(functions[how])
        tape.differentiate(y)


def test_the_core_gets_queries_keys_and_values():
    seen = []

    def core(tape, q, k_t, v):
        seen.append((q.shape, k_t.shape, v.shape))
        return tape.note(core, lambda tape, func, z, v: tape.of(v), (v,), {}, v * 1)

    def attention(x):
        q, k, v = (F.linear(x, W).view(1, 1, 2, 2).transpose(1, 2) for _ in range(3))
        weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        return (weights @ v).transpose(1, 2).reshape(1, 4)

    tape, y = taped(attention, core)
    assert seen == [((1, 2, 1, 2), (1, 2, 2, 1), (1, 2, 1, 2))] and tape.stage == "done"
    assert torch.allclose(tape.differentiate(y).rows(y.shape)[0], W)


def test_a_run_without_attention_says_how_far_it_came():
    tape, _ = taped(lambda x: F.linear(x, W))
    assert tape.stage == "scores"
