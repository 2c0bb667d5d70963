"""What a Jacobian is like by itself, against NumPy and where it is known by hand."""

import math

import cases
import numpy as np
import pytest
import torch
from oracles import oracle
from wrapping import wrapped_on

from lm_eval_coupling.measures.formulas.normality import frobenius, non_normality, symmetric_share
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import TrueDtype


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("J", "normality", "symmetric"),
    [
        (matrix([2, 1], [1, 5]), 0, 1),  # symmetric
        (matrix([0, -3], [3, 0]), 0, 0),  # a rotation, scaled
        (
            matrix([0, 4], [0, 0]),
            math.sqrt(2),
            1 / math.sqrt(2),
        ),  # nilpotent: JJᵀ − JᵀJ = 16 diag(1, −1)
        (
            matrix([1, 1], [0, 0]),
            2 / 2,
            math.sqrt(3) / 2,
        ),  # [[2, 0], [0, 0]] − [[1, 1], [1, 1]], of norm 2
    ],
)
def test_by_hand(J, normality, symmetric):
    for scale in (1, 1e-30):
        assert non_normality(J * scale) == pytest.approx(normality, abs=1e-12)
        assert symmetric_share(J * scale) == pytest.approx(symmetric, abs=1e-12)
    assert (
        math.isnan(non_normality(J * 0))
        and math.isnan(symmetric_share(J * 0))
        and frobenius(J * 0) == 0
    )


def test_a_record_has_them(float64_device):
    llama = cases.tiny_model("llama", num_hidden_layers=4)
    prompt = cases.tiny_tokens(6)
    model = wrapped_on(float64_device, llama)
    (found,) = measure_coupling(
        model, [prompt[0].tolist()], ranks=(2,), dtype="float64", progress=False
    )
    with TrueDtype(torch.float64):
        J = [oracle(llama, prompt, layer, 5, 5).numpy() for layer in range(4)]
    for layer, j in enumerate(J):
        size = np.linalg.norm(j)
        assert found.jacobian_norm[layer] == pytest.approx(np.linalg.norm(j, 2), rel=1e-6)
        assert found.jacobian_frobenius[layer] == pytest.approx(size / math.sqrt(24), rel=1e-6)
        assert found.stable_rank[layer] == pytest.approx(
            (size / np.linalg.norm(j, 2)) ** 2, rel=1e-5
        )
        assert found.non_normality[layer] == pytest.approx(
            np.linalg.norm(j @ j.T - j.T @ j) / size**2, rel=1e-6
        )
        assert found.symmetric_share[layer] == pytest.approx(
            np.linalg.norm((j + j.T) / 2) / size, rel=1e-6
        )
    norms = [np.linalg.norm(j, 2) for j in J]
    expected = np.mean(norms[1:3]) / np.mean([norms[0], norms[3]])
    assert readings()["middle_over_outer_norm"].read(found, 2) == pytest.approx(expected, rel=1e-6)
    assert readings()["mean_jacobian_norm"].read(found, 2) == pytest.approx(
        np.mean(norms), rel=1e-6
    )
