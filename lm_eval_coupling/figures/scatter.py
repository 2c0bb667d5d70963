"""Pictures of regressions: scores over a predictor, predictors compared, answers over coupling, curves over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lm_eval_coupling.figures.palette import CATEGORIES, colours
from lm_eval_coupling.statistics import Fit

_JOINED: dict[str, Any] = {"fmt": "o-", "markersize": 3, "linewidth": 1}
_CLOSE = 0.03  # of the axes: labels nearer than this would cover each other
_FAR = (
    0.6  # of the width: names of points beyond it stand on their left, or they would leave the axes
)
_FAMILIES = 12  # more than that are not told apart by colour
_NAMED = 40  # points; more names than that are not legible


def score_scatter(
    points: pd.DataFrame,
    fits: Sequence[Fit],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
) -> Figure:
    """Draw one point per model with its errors, its name and the colour of its family; fits with their bands.

    Args:
        points: ``x, y, x_error, y_error`` (standard errors or NaN), ``label`` and ``family`` (of many, none is told apart).
        fits: curves through the points; those without a solution are left out.
        x_label: what the predictor is.
        y_label: what the score is.
        title: stands above.

    Returns:
        The figure; it has one ``ErrorbarContainer`` per family.
    """
    figure, (ax,) = _figure(1, width=6.4, height=4.6, title=title)
    points = points.dropna(subset=["x", "y"])
    if points["family"].nunique() > _FAMILIES:
        points = points.assign(family="models")
    families = list(dict.fromkeys(points["family"]))
    for index, family in enumerate(families):
        of = points[points["family"] == family]
        ax.errorbar(
            of["x"],
            of["y"],
            xerr=of["x_error"].fillna(0),
            yerr=of["y_error"].fillna(0),
            fmt="o",
            color=_colour(index, len(families)),
            elinewidth=0.8,
            markersize=4,
            label=family,
        )
    for fit, style in zip(fits, ("-", "--", ":", "-."), strict=False):
        _draw_fit(ax, fit, points["x"], style)
    if len(points) <= _NAMED:
        _name_points(ax, points)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="x-small", frameon=False)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    return figure


def _draw_fit(ax: Axes, fit: Fit, x: pd.Series, style: str) -> None:
    if fit.parameters is None:
        return
    at = np.linspace(x.min(), x.max(), 200)
    low, high = fit.band(at)
    r2 = "" if np.isnan(fit.r2) else f", R² = {fit.r2:.2f}"
    weights = {"none": "", "y": ", weighted", "x and y": ", errors in both"}[fit.errors]
    ax.plot(
        at, fit.predict(at), style, color="0.3", linewidth=1.2, label=f"{fit.form}{weights}{r2}"
    )
    if fit.form == "line" and np.isfinite(low).all():
        ax.fill_between(at, low, high, color="0.5", alpha=0.15, linewidth=0)


def _name_points(ax: Axes, points: pd.DataFrame) -> None:
    """Above the right bar of each point, or where no name stands yet: bars strike through none, curves shine around it."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    taken: list[tuple[float, float]] = []
    for row in points.sort_values("y").itertuples():
        x, y = (row.x - left) / (right - left), (row.y - bottom) / (top - bottom)
        across, anchor, away = (
            (4, "left", "right") if x < _FAR else (-4, "right", "left")
        )  # into the picture first
        sides = [(across, dy, anchor) for dy in (6, -6, 15, -15)] + [
            (-across, dy, away) for dy in (6, -6)
        ]
        free = [
            s
            for s in sides
            if all(
                abs(y + s[1] / 250 - b) > _CLOSE or abs(x + s[0] / 50 - a) > 0.15 for a, b in taken
            )
        ]
        dx, dy, side = (free or sides)[0]
        taken.append((x + dx / 50, y + dy / 250))
        ax.annotate(
            row.label, (row.x, row.y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize="xx-small",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def intervals(
    rows: pd.DataFrame, *, x_label: str, chance: float, title: str | None = None
) -> Figure:
    """Draw an estimate with its interval per row, from top to bottom; the line marks chance.

    Args:
        rows: ``label, value, low, high`` and ``kind``, which gives the colour.
        x_label: what the estimate is.
        chance: its value if there were nothing.
        title: stands above.

    Returns:
        The figure, not yet saved; the more rows, the higher.
    """
    rows = rows.dropna(subset="value")
    figure, (ax,) = _figure(1, width=6.4, height=1.2 + 0.19 * len(rows), title=title)
    kinds = list(dict.fromkeys(rows["kind"]))
    for index, kind in enumerate(kinds):
        at = np.flatnonzero(rows["kind"] == kind)
        of = rows.iloc[at]
        sides = np.abs(of[["low", "high"]].sub(of["value"], axis=0)).fillna(0).T.to_numpy()
        colour = _colour(index, len(kinds))
        ax.errorbar(
            of["value"],
            at,
            xerr=sides,
            fmt="o",
            color=colour,
            elinewidth=1,
            markersize=4,
            label=kind,
        )
    ax.axvline(chance, color="0.4", linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), rows["label"], fontsize="x-small")
    ax.invert_yaxis()
    ax.set_xlabel(x_label)
    if len(kinds) > 1:
        figure.legend(loc="outside right upper", fontsize="x-small", frameon=False)
    return figure


def rank_sweep(rows: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw the correlation with each score over K, the number of singular vectors (paper, fig. 36).

    Args:
        rows: ``score, rank, coefficient, low, high``.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    figure, (ax,) = _figure(1, width=5.2, height=3.8, title=title)
    ranks = sorted(rows["rank"].unique())
    for index, (score, of) in enumerate(rows.sort_values("rank").groupby("score", sort=False)):
        sides = np.abs(of[["low", "high"]].sub(of["coefficient"], axis=0)).fillna(0).T.to_numpy()
        at = of["rank"].map(ranks.index) + 0.04 * index  # beside each other, not on top
        ax.errorbar(at, of["coefficient"], yerr=sides, color=_colour(index), label=score, **_JOINED)
    ax.axhline(0, color="0.4", linewidth=0.8, linestyle="--")
    ax.set_xticks(range(len(ranks)), ranks)
    ax.set_xlabel("K, number of singular vectors")
    ax.set_ylabel("Pearson correlation with the score")
    ax.legend(fontsize="x-small", frameon=False)
    return figure


def accuracy_curves(rows: pd.DataFrame, *, x_label: str, title: str | None = None) -> Figure:
    """Draw the share of right answers over a predictor's bins with its interval, one panel per task, one line per model.

    Args:
        rows: ``model, task, mean`` (of the predictor in the bin), ``accuracy, low, high``.
        x_label: what the predictor is.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    tasks = list(dict.fromkeys(rows["task"]))
    figure, axes = _figure(len(tasks), width=3.2, height=3.2, title=title)
    models = list(dict.fromkeys(rows["model"]))
    for ax, task in zip(axes, tasks, strict=True):
        for model, of in rows[rows["task"] == task].groupby("model", sort=False):
            sides = np.abs(of[["low", "high"]].sub(of["accuracy"], axis=0)).T.to_numpy()
            colour = _colour(models.index(model), len(models))
            ax.errorbar(
                of["mean"], of["accuracy"], yerr=sides, color=colour, label=model, **_JOINED
            )
        ax.set_title(task, fontsize="small")
        ax.set_xlabel(x_label, fontsize="small")
        ax.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of right answers")
    named = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named, loc="outside right upper", fontsize="xx-small", frameon=False
    )
    return figure


def training_curves(rows: pd.DataFrame, *, x_label: str, title: str | None = None) -> Figure:
    """Draw predictor and score over the steps of training, one above the other, one line per training and score.

    Args:
        rows: ``lineage, score_of, step, x, score`` in the order of steps.
        x_label: what the predictor is.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    figure = Figure(figsize=(6.0, 5.0), dpi=200, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for index, ((lineage, score), of) in enumerate(
        rows.groupby(["lineage", "score_of"], sort=False)
    ):
        for ax, column in ((above, "x"), (below, "score")):
            ax.errorbar(
                of["step"], of[column], color=_colour(index), label=f"{lineage}: {score}", **_JOINED
            )
    if (rows["step"] > 0).all() and rows["step"].max() > 100 * rows["step"].min():
        below.set_xscale("log")
    above.set_ylabel(x_label)
    below.set_ylabel("score")
    below.set_xlabel("step of training")
    below.legend(fontsize="xx-small", frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _figure(
    panels: int, *, width: float, height: float, title: str | None
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, height), dpi=200, layout="constrained")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _colour(index: int, of: int = 0) -> str:
    """One of a few that are told apart without colour vision; of more than these, a place on a scale."""
    return (
        list(colours(range(of)).values())[index]
        if of > len(CATEGORIES)
        else CATEGORIES[index % len(CATEGORIES)]
    )
