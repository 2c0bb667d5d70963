"""Jacobians that leave their device block by block come with the triplets of those that stay."""

import pytest
import torch

from lm_eval_coupling.jacobians.stack import Stack
from lm_eval_coupling.numerics.spectra import top_singular


@pytest.mark.parametrize("scattered", [False, True])
def test_triplets_are_those_of_each_jacobian(scattered, device):
    """Whether they stay where they are made, or blocks lie on several devices; one is corrected
    after the others.
    """
    J = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(device)
    stack = Stack(2, 3, J[0, 0], rank=5, scattered=scattered)
    for layer in range(3):
        stack.put(layer, J[:, layer])
    J[1, 2] = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).to(device)
    stack.correct(1, 2, J[1, 2])
    found = stack.finish()
    assert torch.equal(stack.jacobians.to(device), J)
    for prompt in range(2):
        expected = top_singular(J[prompt], 5)
        assert torch.allclose(found[prompt].S, expected.S, rtol=1e-5)
        assert found[prompt].residual.max() < 1e-5 and found[prompt].U.shape == (3, 40, 5)


@pytest.mark.parametrize("scattered", [False, True])
def test_without_a_rank_nothing_is_decomposed(scattered):
    stack = Stack(1, 1, torch.zeros(4, 4), rank=None, scattered=scattered)
    stack.put(0, torch.ones(1, 4, 4))
    assert stack.finish() is None and stack.jacobians.all()


@pytest.mark.parametrize("scattered", [False, True])
def test_one_that_is_not_finite_leaves_the_triplets_to_whoever_asks(scattered):
    stack = Stack(2, 1, torch.zeros(4, 4), rank=2, scattered=scattered)
    stack.put(0, torch.stack([torch.eye(4), torch.full((4, 4), torch.nan)]))
    assert stack.finish() is None
