"""Derivatives are taken whatever mode the caller is in, and a block whose gradients are wrong is
never believed.
"""

import cases
import numpy as np
import pytest
import torch

from lm_eval_coupling import ResidualModel, block_jacobians, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.differences import require_not_constant

MODES = {
    "inference_mode": lambda device: torch.inference_mode(),
    "no_grad": lambda device: torch.no_grad(),
    "set_grad_enabled": lambda device: torch.set_grad_enabled(False),
    "autocast": lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
}


def measured(model):
    (record,) = measure_coupling(
        ResidualModel.wrap(model), [[3, 1, 4, 1, 5]], ranks=(2, 4), progress=False
    )
    assert record.reason is None
    return record


@pytest.mark.parametrize("case", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_the_callers_mode_does_not_matter(case, mode, device):
    """Inside torch.inference_mode() every coupling came out as 1, with a certificate of exactly 0;
    autocast failed all.
    """
    expected = measured(cases.tiny_model(case, torch.float32).to(device))
    with MODES[mode](device):
        model = cases.tiny_model(case, torch.float32).to(
            device
        )  # of inference tensors, where the mode makes them
        found = measured(model)
        on = torch.is_grad_enabled()
    assert on is (mode == "autocast")
    assert found.method == expected.method and 0 < found.certificate.max() < 1e-4
    np.testing.assert_allclose(
        found.normalized_miscoupling, expected.normalized_miscoupling, atol=1e-4
    )


def test_a_default_device_elsewhere_does_not_matter():
    """torch.set_default_device("cuda") made random directions fail, and nothing was recorded;
    "meta" is as far off.
    """
    model = cases.tiny_model("llama", torch.float32)
    expected = measured(model)
    with torch.device("meta"):
        wrapped = ResidualModel.wrap(model)
        assert (
            wrapped.identity == ResidualModel.wrap(model).identity
            and wrapped.describe_change() is None
        )
        found = measured(model)
        assert torch.empty(0).device.type == "meta"
    np.testing.assert_array_equal(found.normalized_miscoupling, expected.normalized_miscoupling)


class _WithoutGradients(torch.nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        if self.how == "detach":
            return self.inner(x).detach()
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("method", ["auto", "token-local", "autodiff"])
def test_a_part_without_gradients_is_refused(how, method):
    """The closed level was right and rejected, autodiff wrong and accepted: both were compared with
    autograd alone.
    """
    model = cases.tiny_model("llama", torch.float32)
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type(
        "Quiet",
        (type(mlp),),
        {"forward": _WithoutGradients.forward, "how": how, "inner": type(mlp).forward.__get__(mlp)},
    )
    wrapped = ResidualModel.wrap(model)
    if (
        method == "token-local" and how == "no_grad"
    ):  # forward mode sees it, the certificate does not
        assert block_jacobians(wrapped, cases.tiny_tokens(7), method=method).certificate[1] > 0.1
        return
    with pytest.raises(
        CouplingError, match=r"block 1 whose output does not move as its gradients say"
    ):
        block_jacobians(wrapped, cases.tiny_tokens(7), method=method)
    (record,) = measure_coupling(wrapped, [[1, 2, 3]], ranks=(2,), method=method, progress=False)
    assert record.normalized_miscoupling is None and "no_grad" in record.reason


def test_a_jacobian_of_exactly_zero_is_suspect():
    wrapped = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    call = wrapped.trace([1, 2, 3]).calls[1]
    with torch.no_grad(), call.ready():
        require_not_constant(call, torch.eye(24), 0.0, 2)
        require_not_constant(call, torch.zeros(24, 24), 1e-7, 2)
        with pytest.raises(
            CouplingError, match="block 1 that is exactly zero though the block changes its token"
        ):
            require_not_constant(call, torch.zeros(24, 24), 0.0, 2)


def test_a_block_that_does_nothing_has_a_jacobian_of_zero():
    """Weights of zero, such as some begin their training with, are no fault."""
    model = cases.tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    assert not block_jacobians(ResidualModel.wrap(model), cases.tiny_tokens(5)).jacobians[0].any()
