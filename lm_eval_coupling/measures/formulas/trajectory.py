"""Regularity of a residual trajectory x^0 … x^L: straightness, exponential growth, equal steps.

Trajectories are [..., points, d_model] with x^0, the input of block 1, first. Everything is
computed and returned in float64; variances are population variances; undefined values are NaN.
A `window` of w takes w consecutive steps (blocks) at a time and returns one value per window, in
order of depth: [..., steps − w + 1]. Without a window, all steps give one value per trajectory.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError


def norms(x: Float[Tensor, "*batch points d_model"]) -> Float[Tensor, "*batch points"]:
    """Return ‖x^l‖ for l = 0 … L."""
    return torch.linalg.vector_norm(x.double(), dim=-1)


def step_lengths(x: Float[Tensor, "*batch points d_model"]) -> Float[Tensor, "*batch steps"]:
    """Return ‖x^l − x^{l−1}‖ for l = 1 … L."""
    return torch.linalg.vector_norm(_steps(x), dim=-1)


def equidistance(
    x: Float[Tensor, "*batch points d_model"], window: int | None = None
) -> Float[Tensor, "*out"]:
    """Return the coefficient of variation of the step lengths: 0 for equal steps, more for others.

    Args:
        x: trajectories.
        window: number of steps in a row to take together; None for all steps of a trajectory.

    Returns:
        A number for each trajectory [*batch], or for each window of it [*batch, windows]; NaN where
        all steps are zero.

    Raises:
        CouplingError: if there is no step, or the window is outside 1 … steps.
    """
    lengths = _windows(step_lengths(x), window)
    return _drop(lengths.std(dim=-1, correction=0) / lengths.mean(dim=-1), window)


def line_shape_score(
    x: Float[Tensor, "*batch points d_model"], window: int | None = None
) -> Float[Tensor, "*out"]:
    """Return L / ‖Σ_l (x^l − x^{l−1}) / ‖x^l − x^{l−1}‖‖: 1 for a straight line, larger otherwise.

    NaN where a step is zero, or where the unit steps return exactly to their start.

    Raises:
        CouplingError: if there is no step, or the window is outside 1 … steps.
    """
    steps = _steps(x)
    # A zero step divides to NaN.
    units = _windows((steps / torch.linalg.vector_norm(steps, dim=-1, keepdim=True)).mT, window)
    distance = torch.linalg.vector_norm(units.sum(dim=-1), dim=-2)
    score = torch.where(distance == 0, torch.nan, units.shape[-1] / distance)
    return _drop(score, window)


def expodistance(
    x: Float[Tensor, "*batch points d_model"], window: int | None = None
) -> Float[Tensor, "*out"]:
    """Return Var_l α^l / (Mean_l α^l)² with α^l = ln(‖x^l‖ / ‖x^{l−1}‖).

    0 for exponential growth of the norm, NaN where a norm or the mean growth is 0. Values above the
    number of steps are ill-conditioned: the mean growth is within a standard error of zero.

    Raises:
        CouplingError: if there is no step, or the window is outside 1 … steps.
    """
    size = norms(x)
    alpha = _windows(torch.where(size == 0, torch.nan, size).log().diff(dim=-1), window)
    mean = alpha.mean(dim=-1)
    return _drop(
        torch.where(mean == 0, torch.nan, alpha.var(dim=-1, correction=0) / mean.square()), window
    )


def principal_trajectories(
    x: Float[Tensor, "token points d_model"], components: int = 3
) -> tuple[Float[Tensor, "token points component"], Float[Tensor, " component"]]:
    """Project trajectories onto the principal components of their last points.

    Returns:
        Projected trajectories, and each component's share of the variance of the last points. The
        largest loading of a component is positive. There are at most token − 1 components.
    """
    last = x[:, -1].double()
    center = last.mean(dim=0)
    _, S, Vt = torch.linalg.svd(last - center, full_matrices=False)
    count = min(components, len(last) - 1)
    axes = Vt[:count]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return (x.double() - center) @ axes.T, S[:count].square() / S.square().sum()


def entropy(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch"]:
    """Return the entropy of softmax(logits) in nats, in the dtype of the logits."""
    return torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)


def _steps(x: Float[Tensor, "*batch points d_model"]) -> Float[Tensor, "*batch steps d_model"]:
    return x.double().diff(dim=-2)


def _windows(
    values: Float[Tensor, "*batch steps"], window: int | None
) -> Float[Tensor, "*batch windows window"]:
    """Return all runs of ``window`` steps in a row; a step joins two points of a trajectory."""
    steps = values.shape[-1]
    if steps == 0:
        raise CouplingError(
            "got a trajectory of fewer than 2 points, expected at least 2; "
            "use a model with at least one block"
        )
    if window is None:
        window = steps
    if not 1 <= window <= steps:
        raise CouplingError(
            f"got a window of {window} steps on a trajectory of {steps}, expected 1 to {steps}"
        )
    return values.unfold(-1, window, 1)


def _drop(values: Float[Tensor, "*batch windows"], window: int | None) -> Float[Tensor, "*out"]:
    return values[..., 0] if window is None else values
