"""A block that adds next to nothing to the stream keeps the digits of its Jacobian."""

import copy

import cases
import pytest
import torch
from oracles import oracle, worst

from lm_eval_coupling import ResidualModel, block_jacobians
from lm_eval_coupling.jacobians.tangent import NearIdentity, Origin
from lm_eval_coupling.residual import TrueDtype

OUTPUTS = ("down_proj", "o_proj", "c_proj", "dense_4h_to_h", "attention.dense", "post_attention_layernorm")
OUTPUTS += ("post_feedforward_layernorm",)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "olmo2", "bloom", "falcon-alibi"])
def test_digits_do_not_go_with_the_identity(case):
    """J was ∂F less 1, its error 1e-7 whatever its own size, and hidden by the certificate's floor."""
    model = cases.tiny_model(case, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{output}.weight" in name for output in OUTPUTS):
                parameter.mul_(1e-3)
    found = block_jacobians(ResidualModel.wrap(model), cases.tiny_tokens(7))
    twin = copy.deepcopy(model).double()
    for layer, jacobian in enumerate(found.jacobians):
        with TrueDtype(torch.float64):
            expected = oracle(twin, cases.tiny_tokens(7), layer, 6, 6)
        assert found.method[layer] == "closed" and expected.norm() < 0.05
        size = expected.norm()
        assert worst(jacobian.double() / size, expected / size) < 2e-6


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
        made[parts] = NearIdentity(root, some(2, 5), *low, some(2, 5, 5) if "rest" in parts else None)
    rows, factor = some(2, 3, 5), some(2, 5)
    for a in made.values():
        assert torch.allclose(a.after(rows), rows @ a.matrix())
        assert torch.allclose(a.total(), a.matrix().sum(1))
        assert torch.allclose(a.scaled(factor, factor.shape).matrix(), factor[..., None] * a.matrix())
        assert torch.allclose(a.matrix(1.0), a.matrix() - torch.eye(5, dtype=torch.float64))
        for b in made.values():
            assert torch.allclose(a.over(b).matrix(), a.matrix() @ b.matrix())
            assert torch.allclose(a.plus(b.left, b.right, b.diagonal, b.rest).matrix(), a.matrix() + b.matrix())
