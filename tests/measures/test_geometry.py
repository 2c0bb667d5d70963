"""Geometry against loops over single numbers, and where the answer is known by hand."""

import math

import cases
import numpy as np
import pytest
import torch
from wrapping import wrapped_on

from lm_eval_coupling.measures.formulas import token_states as maths
from lm_eval_coupling.measures.registry import readings, registered_measures
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cos(a, b):
    return (
        sum(p * q for p, q in zip(a, b, strict=True))
        / math.dist(a, [0] * len(a))
        / math.dist(b, [0] * len(b))
    )


def effective_rank(X):
    p = np.linalg.svd(X, compute_uv=False) ** 2
    p = p[p > 1e-12 * p.sum()] / p.sum()
    return math.exp(-sum(value * math.log(value) for value in p))


def procrustes(X, Y):
    """Return the best fit of Y by scaled rotations of X: Q by SVD, then the residual."""
    X, Y = (Z - Z.mean(axis=0) for Z in (X, Y))
    X, Y = X / np.linalg.norm(X), Y / np.linalg.norm(Y)
    U, S, Vt = np.linalg.svd(X.T @ Y)
    return 1 - np.linalg.norm(S.sum() * X @ U @ Vt - Y) ** 2


def naive(x, X):
    """Return every column from the stream at the token and the states [depth][token]."""
    x, X = x.cpu().numpy(), [states.cpu().numpy() for states in X]
    steps = range(1, len(x))
    update = {i: x[i] - x[i - 1] for i in steps}
    found = {
        "block_influence": [1 - cos(x[i - 1], x[i]) for i in steps],
        "relative_contribution": [
            np.linalg.norm(update[i]) / np.linalg.norm(x[i - 1]) for i in steps
        ],
        "contribution_cosine": [cos(update[i], x[i - 1]) for i in steps],
        "massive_activation": [np.abs(point).max() / np.median(np.abs(point)) for point in x],
        "state_entropy": [math.log(effective_rank(states)) for states in X],
        "state_effective_rank": [effective_rank(states) for states in X],
        "anisotropy": [],
        "state_effective_rank_centred": [],
        "token_curvature": [],
        "linearity": [procrustes(X[i - 1], X[i]) for i in steps],
        "linearity_of_update": [procrustes(X[i - 1], X[i] - X[i - 1]) for i in steps],
    }
    for states in X:
        squares = np.linalg.svd(states, compute_uv=False) ** 2
        found["anisotropy"].append(squares[0] / squares.sum())
        centred = states - states.mean(axis=0)
        found["state_effective_rank_centred"].append(
            effective_rank(np.stack([row / np.linalg.norm(row) for row in centred]))
        )
        moves = [states[t + 1] - states[t] for t in range(len(states) - 1)]
        found["token_curvature"].append(
            np.mean([math.acos(max(-1, cos(a, b))) for a, b in zip(moves, moves[1:], strict=False)])
        )
    normed = np.stack([row / np.linalg.norm(row) for row in X[-1]])
    columns = sorted((np.linalg.norm(column) for column in normed.T), reverse=True)
    found["matrix_nuclear_norm"] = sum(columns[: min(normed.shape)]) / len(normed)
    return found


@pytest.mark.parametrize("seq", [3, 7, 40])  # fewer tokens than dimensions, and more
def test_a_record_is_that_of_the_loops(seq, float64_device):
    model = wrapped_on(float64_device, cases.tiny_model("llama"))
    prompt = cases.tiny_tokens(seq)[0].tolist()
    trace = model.trace(prompt, torch.float64)
    states = [*(call.resid_pre[0] for call in trace.calls), trace.resid_final[0]]
    (found,) = measure_coupling(
        model,
        [prompt],
        measures=["geometry"],
        position=1,
        dtype="float64",
        ranks=[2],
        progress=False,
    )
    assert found.reason is None and found.certificate is None
    expected = naive(trace.trajectory(1), states)
    assert set(expected) == {column.name for column in registered_measures()["geometry"].columns}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-7, err_msg=name)


def test_one_block_by_hand():
    x = rows([3, 0, 0, 4], [0, 3, 4, 0], [0, 6, 8, 0])
    assert maths.block_influence(x).tolist() == pytest.approx([1, 0])
    assert maths.relative_contribution(x).tolist() == pytest.approx([math.sqrt(2), 1])
    assert maths.contribution_cosine(x).tolist() == pytest.approx([-1 / math.sqrt(2), 1])
    assert maths.massive_activation(rows([1, -8, 2, 4])).tolist() == pytest.approx([8 / 3])


def test_states_by_hand():
    square = rows([1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0])
    shares = maths.States(square).spectrum()
    assert maths.entropy_of(shares).item() == pytest.approx(math.log(2)) and shares[
        -1
    ].item() == pytest.approx(0.5)
    assert maths.token_curvature(square).item() == pytest.approx(math.pi / 2)
    assert maths.token_curvature(rows([0, 0], [1, 1], [2, 2], [5, 5])).item() == pytest.approx(
        0, abs=1e-7
    )
    assert maths.token_curvature(rows([0, 0], [1, 1], [0, 0])).item() == pytest.approx(math.pi)
    # Rows become (1, 0) and (0, 1) twice: two columns of norm √2, over four tokens.
    assert maths.matrix_nuclear_norm(rows([2, 0], [0, 3], [4, 0], [0, 5])).item() == pytest.approx(
        2 * math.sqrt(2) / 4
    )
    # Less their mean, and of norm 1, the rows are (1, 0), (−1, 0), (0, 1), (0, −1).
    cross = maths.States(rows([9, 5, 1], [1, 5, 1], [5, 7, 1], [5, 3, 1]))
    assert maths.entropy_of(cross.spectrum_normalized()).exp().item() == pytest.approx(2)


@pytest.mark.parametrize("shape", [(5, 9), (30, 6)])
def test_similarity_is_one_for_rotations_and_does_not_see_scale_nor_place(shape):
    X, Q = random(*shape), torch.linalg.qr(random(shape[1], shape[1], seed=1)).Q
    assert maths.procrustes_similarity(
        maths.States(X), maths.States(3 * X @ Q + 7)
    ).item() == pytest.approx(1, abs=1e-9)
    assert (
        maths.procrustes_similarity(maths.States(X), maths.States(random(*shape, seed=2))).item()
        < 0.95
    )


def test_prompts_too_short_have_the_rest(monkeypatch):
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    (found,) = measure_coupling(model, [[1, 2]], measures=["geometry"], ranks=[2], progress=False)
    assert (
        found.reason == "no geometry of the tokens' states: the prompt has 2, at least 3 are needed"
    )
    assert (
        found.reason_codes == ("too_short",)
        and found.state_entropy is None
        and math.isnan(found.matrix_nuclear_norm)
    )
    assert np.isfinite(found.block_influence).all() and math.isnan(
        readings()["curvature_drop"].read(found, 2)
    )
    assert readings()["mean_block_influence"].read(found, 2) == pytest.approx(
        found.block_influence.mean()
    )


def test_what_is_undefined_is_said():
    silent = cases.tiny_model("llama")
    for weight in (
        silent.model.layers[1].self_attn.o_proj.weight,
        silent.model.layers[1].mlp.down_proj.weight,
    ):
        weight.data.zero_()
    (found,) = measure_coupling(
        ResidualModel.wrap(silent),
        [[1, 2, 3, 4]],
        measures=["geometry"],
        ranks=[2],
        dtype="float64",
        progress=False,
    )
    assert (
        found.reason == "undefined contribution_cosine, linearity_of_update: "
        "a state, a step or their spread is zero"
    )
    assert np.isnan(found.contribution_cosine).tolist() == [False, True]
    assert found.linearity[1] == pytest.approx(1) and found.block_influence[1] == pytest.approx(
        0, abs=1e-12
    )
