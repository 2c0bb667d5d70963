"""Regularity of trajectories against loops, and where the answer is known by hand."""

import math

import pytest
import reference
import torch

from lm_eval_coupling.measures.formulas.trajectory import (
    entropy,
    equidistance,
    expodistance,
    line_shape_score,
    norms,
    step_lengths,
)

WINDOWED = {
    "equidistance": equidistance,
    "line_shape_score": line_shape_score,
    "expodistance": expodistance,
}
windowed = pytest.mark.parametrize("name", WINDOWED)


def trajectory(points=13, d=7, seed=0, dtype=torch.float64):
    steps = torch.randn(
        points, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return steps.cumsum(0).to(dtype)


@windowed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("points", [2, 3, 13])
def test_against_loops(name, points, dtype):
    x = trajectory(points, dtype=dtype)
    found = WINDOWED[name](x)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(getattr(reference, name)(x.double()), rel=1e-10, abs=1e-14)


@windowed
@pytest.mark.parametrize("window", [1, 4, 11, 12])
def test_windows_against_loops(name, window):
    x = trajectory()
    found = WINDOWED[name](x, window=window)
    assert found.shape == (13 - window,)
    assert found.tolist() == pytest.approx(
        reference.windowed(getattr(reference, name), x, window), rel=1e-10, abs=1e-14
    )


@windowed
def test_batches(name):
    x = torch.stack([trajectory(seed=s) for s in range(6)]).reshape(2, 3, 13, 7)
    found = WINDOWED[name](x)
    assert found.shape == (2, 3)
    assert found[1, 2].item() == pytest.approx(WINDOWED[name](x[1, 2]).item())
    assert WINDOWED[name](x, window=5).shape == (2, 3, 8)


def test_norms_and_steps_against_loops():
    x = trajectory()
    assert norms(x).tolist() == pytest.approx(reference.norms(x))
    assert step_lengths(x).tolist() == pytest.approx(reference.step_lengths(x))
    assert norms(x[None]).shape == (1, 13) and step_lengths(x[None]).shape == (1, 12)


def test_a_straight_line_scores_one_whatever_its_steps():
    direction, start = trajectory(2)
    x = start + torch.tensor([0.0, 1.0, 1.5, 4.0, 10.0]).double()[:, None] * direction
    assert line_shape_score(x).item() == pytest.approx(1, abs=1e-12)
    assert (line_shape_score(x, window=2) - 1).abs().max() < 1e-12


def test_a_right_angle_scores_root_two():
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0], [5.0, 1.0]])
    assert line_shape_score(x).item() == pytest.approx(math.sqrt(2))


def test_line_shape_score_is_at_least_one():
    assert all(line_shape_score(trajectory(seed=s)) >= 1 for s in range(20))


def test_exponential_growth_has_no_expodistance():
    x = 1.3 ** torch.arange(12).double()[:, None] * trajectory(2)[0]
    assert expodistance(x).item() == pytest.approx(0, abs=1e-24)
    shrinking = x.flip(0)
    assert expodistance(shrinking).item() == pytest.approx(0, abs=1e-24)


def test_expodistance_by_hand():
    x = torch.tensor([1.0, math.e, math.e**4]).double()[:, None]
    assert expodistance(x).item() == pytest.approx(1 / 4)


def test_equidistance_by_hand():
    assert equidistance(torch.tensor([[0.0], [1.0], [2.0], [1.0]])).item() == 0
    assert equidistance(torch.tensor([[0.0], [1.0], [4.0]])).item() == pytest.approx(1 / 2)


def test_a_zero_step_is_undefined_for_the_line_only():
    x = trajectory()
    x[4] = x[3]
    assert line_shape_score(x).isnan()
    assert line_shape_score(x, window=2).isnan().nonzero().flatten().tolist() == [2, 3]
    assert expodistance(x).isfinite() and equidistance(x).isfinite()


def test_a_zero_norm_is_undefined_for_growth_only():
    x = trajectory()
    x[0] = 0
    assert expodistance(x).isnan()
    assert expodistance(x, window=3).isnan().nonzero().flatten().tolist() == [0]
    assert line_shape_score(x).isfinite() and equidistance(x).isfinite()


def test_a_still_trajectory_is_undefined():
    x = torch.ones(4, 3)
    assert line_shape_score(x).isnan() and expodistance(x).isnan() and equidistance(x).isnan()


def test_growth_that_averages_to_zero_is_undefined_not_infinite():
    assert expodistance(torch.tensor([[1.0], [2.0], [1.0]])).isnan()
    assert line_shape_score(torch.tensor([[0.0], [1.0], [0.0]])).isnan()


def test_non_finite_points_give_nan():
    x = trajectory()
    x[2, 1] = math.inf
    assert line_shape_score(x).isnan() and expodistance(x).isnan() and equidistance(x).isnan()


@windowed
def test_windows_that_do_not_fit_are_refused(name):
    for window in (0, 13):
        with pytest.raises(ValueError, match=f"got a window of {window} steps"):
            WINDOWED[name](trajectory(), window=window)
    with pytest.raises(ValueError, match="fewer than 2 points"):
        WINDOWED[name](trajectory(1))


def test_entropy_by_hand():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -math.inf, -math.inf], [9e4, 0.0, 0.0, 0.0]]
    )
    expected = [math.log(4), -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0.0]
    assert torch.allclose(entropy(logits), torch.tensor(expected), atol=1e-6)
