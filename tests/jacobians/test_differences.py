"""A block whose derivative leaves out a part of its output is caught by differences of outputs."""

import cases
import pytest
import torch

from lm_eval_coupling import ResidualModel, block_jacobians, measure_coupling
from lm_eval_coupling.errors import CouplingError

UNSEEN = {
    "NumPy": lambda y: torch.from_numpy(y.detach().numpy() * 1.2),
    "a twentieth through NumPy": lambda y: y + torch.from_numpy(y.detach().numpy() * 0.05),
    "NumPy of half precision": lambda y: torch.from_numpy(
        y.detach().numpy().astype("float16").astype("float32")
    ),
    "a factor by item": lambda y: y * float(y.norm()),
    "a sum by item": lambda y: y + 3 * y[..., -1, :].mean().item(),
    "a list": lambda y: torch.tensor(y.tolist(), dtype=y.dtype),
    "half detached": lambda y: 0.5 * y + 0.5 * y.detach(),
}
SEEN = {
    "a factor": lambda y: y * 1.2,
    "a kink": lambda y: y.clamp(-0.05, 0.05),
    "a collector": lambda y: (y.detach().numpy().sum(), y)[1],
}


def hooked(function):
    model = cases.tiny_model("llama", torch.float32)
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, output: function(output))
    return ResidualModel.wrap(model)


@pytest.mark.parametrize("seq", [9, 80])  # one traced whole, one with keys
@pytest.mark.parametrize("how", UNSEEN)
def test_a_part_that_autograd_does_not_see_is_refused(how, seq):
    """Its Jacobian lacked that part, with a perfect certificate."""
    prompt = cases.tiny_tokens(seq)[0].tolist()
    (record,) = measure_coupling(hooked(UNSEEN[how]), [prompt], ranks=(2,), progress=False)
    assert record.singular_values is None
    assert "block 1 whose output does not move as its gradients say" in record.reason


@pytest.mark.parametrize("seq", [9, 80])
@pytest.mark.parametrize("how", SEEN)
def test_a_part_that_autograd_sees_is_measured(how, seq):
    prompt = cases.tiny_tokens(seq)[0].tolist()
    (record,) = measure_coupling(hooked(SEEN[how]), [prompt], ranks=(2,), progress=False)
    assert record.reason is None and record.certificate.max() < 1e-5


@pytest.mark.parametrize("method", ["auto", "closed", "token-local", "autodiff"])
def test_every_method_is_compared(method):
    with pytest.raises(CouplingError):
        block_jacobians(
            hooked(UNSEEN["a twentieth through NumPy"]), cases.tiny_tokens(9), method=method
        )


def test_a_block_is_compared_once(monkeypatch):
    """The second prompt costs no passes for it."""
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    block_jacobians(model, cases.tiny_tokens(9))
    assert all(block.is_verified for block in model.block_list)
    calls = []
    right = type(model.trace([1, 2]).calls[0]).in_dtype
    monkeypatch.setattr(
        type(model.trace([1, 2]).calls[0]),
        "in_dtype",
        lambda call, dtype: calls.append(call.layer) or right(call, dtype),
    )
    block_jacobians(model, cases.tiny_tokens(7))
    assert calls == []


def test_a_forgotten_token_of_linear_attention_is_no_fault():
    """Its Jacobian is next to nothing, and steps that round to float32 move more than it."""
    model = ResidualModel.wrap(cases.tiny_model("qwen3-next"))
    for token in (0, 1):
        found = block_jacobians(model, cases.tiny_tokens(9), input_token=token)
        assert found.jacobians[0].norm() < 1e-6
