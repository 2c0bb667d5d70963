"""Pictures of regressions: scores over a predictor, estimates, curves along training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lm_eval_coupling.figures.canvas import (
    add_legend,
    draw_chance_line,
    make_grid,
    picture_name,
    set_title,
)
from lm_eval_coupling.figures.palette import CATEGORIES, assign_colors
from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.statistics import Fit

_JOINED: dict[str, Any] = {"fmt": "o-", "markersize": 3, "linewidth": 1}
_CLOSE = 0.03  # share of the axes' height within which two names would overlap
_RIGHT_PART = 0.6  # share of the width beyond which a name stands left of its point
_MOST_FAMILIES = 12  # that colors tell apart
_MOST_NAMES = 40  # that are legible


def score_scatter(
    points: pd.DataFrame,
    fits: Sequence[Fit],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
) -> Figure:
    """Draw one named point per model with its errors, in the color of its family, and the fits.

    A vertical line marks chance where the predictor is ``coupling@K``.

    Args:
        points: ``x, y, x_error, y_error`` (standard errors or NaN), ``label`` and ``family``.
        fits: curves through the points; fits without a solution are left out.
        x_label: name of the predictor.
        y_label: name of the score.
        title: stands above.

    Returns:
        The figure, with one ``ErrorbarContainer`` per family. Many families share one color.
    """
    figure, (ax,) = make_grid(1, width=5.8, height=4.4, title=title)
    points = points.dropna(subset=["x", "y"])
    if points["family"].nunique() > _MOST_FAMILIES:
        points = points.assign(family="models")
    colors = assign_colors(points["family"])
    for family, of in points.groupby("family", sort=False):
        errors = of[["x_error", "y_error"]].fillna(0)
        ax.errorbar(
            of["x"],
            of["y"],
            xerr=errors["x_error"],
            yerr=errors["y_error"],
            fmt="o",
            color=colors[family],
            elinewidth=0.8,
            markersize=4,
            label=picture_name(family),
        )
    for fit, style in zip(fits, ("-", "--", ":", "-."), strict=False):
        _draw_fit(ax, fit, points["x"], style)
    _draw_chance(ax, x_label)
    if len(points) <= _MOST_NAMES:
        _name_points(ax, points)
    ax.set_xlabel(picture_name(x_label))
    ax.set_ylabel(picture_name(y_label))
    add_legend(figure, [ax])
    return figure


def _draw_chance(ax: Axes, predictor: str) -> None:
    """Mark the coupling of unrelated layers on the horizontal axis."""
    if match := re.fullmatch(r"coupling@(\d+)", predictor):
        draw_chance_line(ax, chance_coupling(int(match[1])), vertical=True)


def _draw_fit(ax: Axes, fit: Fit, x: pd.Series, style: str) -> None:
    """Draw a fitted curve over the range of x, with its confidence band if it is a line."""
    if fit.parameters is None:
        return
    at = np.linspace(x.min(), x.max(), 200)
    weights = {"none": "", "y": ", weighted", "x and y": ", errors in both"}[fit.errors]
    r2 = "" if np.isnan(fit.r2) else f", R² = {fit.r2:.2f}"
    label = f"{fit.form}{weights}{r2}"
    ax.plot(at, fit.predict(at), style, color="0.3", linewidth=1.2, label=label)
    low, high = fit.band(at)
    if fit.form == "line" and np.isfinite(low).all():
        ax.fill_between(at, low, high, color="0.5", alpha=0.15, linewidth=0)


def _name_points(ax: Axes, points: pd.DataFrame) -> None:
    """Name each point above or below its horizontal bar, where no other name stands yet."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    placed: list[tuple[float, float]] = []
    for row in points.sort_values("y").itertuples():
        x, y = (row.x - left) / (right - left), (row.y - bottom) / (top - bottom)
        # Names point into the picture, or they would leave the axes.
        dx, anchor, other = (4, "left", "right") if x < _RIGHT_PART else (-4, "right", "left")
        places = [(dx, dy, anchor) for dy in (6, -6, 15, -15)] + [
            (-dx, dy, other) for dy in (6, -6)
        ]
        free = [
            (across, up, side)
            for across, up, side in places
            if all(
                abs(y + up / 250 - b) > _CLOSE or abs(x + across / 50 - a) > 0.15 for a, b in placed
            )
        ]
        across, up, side = (free or places)[0]
        placed.append((x + across / 50, y + up / 250))
        ax.annotate(
            picture_name(row.label),
            (row.x, row.y),
            (across, up),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize="xx-small",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def intervals(
    rows: pd.DataFrame, *, x_label: str, chance: float, title: str | None = None
) -> Figure:
    """Draw one estimate with its interval per row, from top to bottom, beside chance.

    Args:
        rows: ``label, value, low, high`` and ``kind``, which gives the color.
        x_label: name of the estimate.
        chance: value of the estimate if there were no relation.
        title: stands above.

    Returns:
        The figure; its height grows with the rows.
    """
    rows = rows.dropna(subset="value")
    figure, (ax,) = make_grid(1, width=5.8, height=0.6 + 0.19 * len(rows), title=title)
    kinds = list(dict.fromkeys(rows["kind"]))
    colors = assign_colors(kinds)
    for kind in kinds:
        at = np.flatnonzero(rows["kind"] == kind)
        of = rows.iloc[at]
        ax.errorbar(
            of["value"],
            at,
            xerr=_bar_sides(of, "value"),
            fmt="o",
            color=colors[kind],
            elinewidth=1,
            markersize=4,
            label=picture_name(kind),
        )
    ax.axvline(chance, color="0.4", linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), rows["label"].map(picture_name), fontsize="x-small")
    ax.invert_yaxis()
    ax.set_xlabel(picture_name(x_label))
    if len(kinds) > 1:
        add_legend(figure, [ax])
    return figure


def rank_sweep(rows: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw the correlation with each score over K, the number of singular vectors (fig. 36).

    Args:
        rows: ``score, rank, coefficient, low, high``.
        title: stands above.

    Returns:
        The figure.
    """
    figure, (ax,) = make_grid(1, width=4.6, height=3.4, title=title)
    ranks = sorted(rows["rank"].unique())
    colors = assign_colors(rows["score"])
    for number, (score, of) in enumerate(rows.sort_values("rank").groupby("score", sort=False)):
        at = of["rank"].map(ranks.index) + 0.04 * number  # shifted, so that bars do not overlap
        sides = _bar_sides(of, "coefficient")
        style: dict[str, Any] = {"color": colors[score], "label": picture_name(score), **_JOINED}
        ax.errorbar(at, of["coefficient"], yerr=sides, **style)
    ax.axhline(0, color="0.4", linewidth=0.8, linestyle="--")
    ax.set_xticks(range(len(ranks)), ranks)
    ax.set_xlabel("K, number of singular vectors")
    ax.set_ylabel("Pearson correlation with the score")
    add_legend(figure, [ax])
    return figure


def accuracy_curves(rows: pd.DataFrame, *, x_label: str, title: str | None = None) -> Figure:
    """Draw the share of right answers over bins of a predictor, a panel per task, a line per model.

    Args:
        rows: ``model, task, mean`` (of the predictor in the bin), ``accuracy, low, high``.
        x_label: name of the predictor.
        title: stands above.

    Returns:
        The figure.
    """
    tasks = list(dict.fromkeys(rows["task"]))
    figure, axes = make_grid(len(tasks), width=3.2, height=2.8, title=title, share_y=True)
    colors = assign_colors(rows["model"])
    for ax, task in zip(axes, tasks, strict=True):
        for model, of in rows[rows["task"] == task].groupby("model", sort=False):
            style: dict[str, Any] = {
                "color": colors[model],
                "label": picture_name(model),
                **_JOINED,
            }
            ax.errorbar(of["mean"], of["accuracy"], yerr=_bar_sides(of, "accuracy"), **style)
        _draw_chance(ax, x_label)
        set_title(ax, task)
        ax.set_xlabel(picture_name(x_label), fontsize="small")
        ax.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of right answers")
    add_legend(figure, axes)
    return figure


def training_curves(rows: pd.DataFrame, *, x_label: str, title: str | None = None) -> Figure:
    """Draw predictor and score over training steps, a line per training and score.

    Args:
        rows: ``lineage, score_of, step, x, score`` in the order of steps.
        x_label: name of the predictor.
        title: stands above.

    Returns:
        The figure.
    """
    figure, (above, below) = make_grid(2, width=5.4, height=2.2, columns=1, title=title)
    lines = list(rows.groupby(["lineage", "score_of"], sort=False))
    for number, ((lineage, score), of) in enumerate(lines):
        label = picture_name(f"{lineage}: {score}")
        style: dict[str, Any] = {"color": CATEGORIES[number % len(CATEGORIES)], "label": label}
        above.errorbar(of["step"], of["x"], **style, **_JOINED)
        below.errorbar(of["step"], of["score"], **style, **_JOINED)
    if (rows["step"] > 0).all() and rows["step"].max() > 100 * rows["step"].min():
        above.set_xscale("log")
        below.set_xscale("log")
    above.set_ylabel(picture_name(x_label))
    below.set_ylabel("score")
    below.set_xlabel("step of training")
    add_legend(figure, [below])
    return figure


def _bar_sides(rows: pd.DataFrame, value: str) -> Float[np.ndarray, "2 row"]:
    """Return the lengths of the error bars below and above; 0 where there is no interval."""
    return np.abs(rows[["low", "high"]].sub(rows[value], axis=0)).fillna(0).T.to_numpy()
