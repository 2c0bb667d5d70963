"""Pictures of studies over documents: against a number, paired between tasks, with noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coupling_analysis.line_figures import curves
from lm_eval_coupling.figures.canvas import (
    add_caption,
    draw_chance_line,
    label_y_axis,
    layer_ticks,
    make_grid,
    picture_name,
    set_title,
    split_panels,
)
from lm_eval_coupling.figures.palette import assign_colors


def document_scatter(
    rows: pd.DataFrame,
    bins: pd.DataFrame,
    correlations: pd.DataFrame,
    *,
    x: str,
    x_label: str,
    title: str | None = None,
) -> Figure:
    """Draw each document's value over a number of it, with medians and quartiles of bins (fig. 9).

    Args:
        rows: one per document: ``panel, line, value, chance`` and the column ``x``.
        bins: ``panel, line, q25, median, q75`` and the column ``x``.
        correlations: ``panel, line, coefficient, low, high, n`` of Spearman's correlation.
        x: column of the number.
        x_label: name of the number.
        title: stands above.

    Returns:
        The figure.
    """
    panels, empty = split_panels(rows, [x, "value"])
    figure, axes = make_grid(len(panels), width=3.6, title=title)
    add_caption(figure, empty)
    colors = assign_colors(rows["line"])
    for ax, panel in zip(axes, panels, strict=True):
        of_panel, bins_of, correlations_of = (
            frame[frame["panel"] == panel] for frame in (rows, bins, correlations)
        )
        for line, points in of_panel.groupby("line", sort=False):
            color = colors[line]
            ax.scatter(points[x], points["value"], s=5, color=color, alpha=0.35, linewidths=0)
            binned = bins_of[bins_of["line"] == line]
            outcome = correlations_of[correlations_of["line"] == line].iloc[0]
            ax.errorbar(
                binned[x],
                binned["median"],
                yerr=np.abs(binned[["q25", "q75"]].sub(binned["median"], axis=0)).T.to_numpy(),
                fmt="o-",
                color=color,
                markersize=4,
                capsize=2,
                linewidth=1,
                markeredgecolor="black",
                markeredgewidth=0.4,
                label=f"{picture_name(line, 40)}: {_describe_correlation(outcome)}",
            )
        for chance in of_panel["chance"].dropna().unique():
            draw_chance_line(ax, chance)
        label_y_axis(ax, panel)
        ax.set_xlabel(picture_name(x_label), fontsize="small")
        ax.tick_params(labelsize="small")
        # Each panel has its own correlations, hence its own legend, below it.
        ax.legend(fontsize="xx-small", frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))
    return figure


def _describe_correlation(outcome: pd.Series) -> str:
    n = f"n = {outcome['n']}"
    if outcome["n"] < 2:
        return n
    has_interval = not np.isnan(outcome["low"])
    interval = f" [{outcome['low']:+.2f}, {outcome['high']:+.2f}]" if has_interval else ""
    return f"ρ = {outcome['coefficient']:+.2f}{interval}, {n}"


def paired_differences(
    pairs: pd.DataFrame,
    by_layer: pd.DataFrame,
    *,
    names: tuple[str, str],
    chance: Mapping[str, float],
    title: str | None = None,
) -> Figure:
    """Draw the same documents in two tasks: one value over the other, and differences by layer.

    Args:
        pairs: ``panel, line, weights, first, second``, one per document.
        by_layer: ``line, weights, depth, difference, low, high, n`` of each layer's coupling.
        names: of the two tasks.
        chance: chance level of the panels that have one.
        title: stands above.

    Returns:
        The figure.
    """
    panels, empty = split_panels(pairs, ["first", "second"])
    by_layer = by_layer.dropna(subset=["depth", "difference"])
    figure, axes = make_grid(len(panels) + bool(len(by_layer)), width=3.6, columns=2, title=title)
    add_caption(figure, empty)
    colors = assign_colors(pairs["line"])
    for ax, panel in zip(axes, panels, strict=False):
        of_panel = pairs[pairs["panel"] == panel].dropna(subset=["first", "second"])
        for (line, weights), points in of_panel.groupby(["line", "weights"], sort=False):
            style: dict[str, Any] = {"color": colors[line]}
            if weights == "untrained":
                style = {"facecolors": "none", "edgecolors": colors[line]}
            higher = f"{(points['second'] > points['first']).mean():.0%} higher"
            ax.scatter(
                points["first"],
                points["second"],
                s=9,
                linewidths=0.6,
                alpha=0.7,
                label=f"{picture_name(line, 40)}, {weights} (n = {len(points)}, {higher})",
                **style,
            )
        _draw_diagonal(ax, chance.get(panel))
        set_title(ax, panel)
        ax.set_xlabel(picture_name(names[0]), fontsize="small")
        ax.set_ylabel(picture_name(names[1]), fontsize="small")
        ax.tick_params(labelsize="small")
        ax.legend(fontsize="xx-small", frameon=False)
    if len(by_layer):
        _draw_differences(axes[-1], by_layer, colors)
    return figure


def _draw_diagonal(ax: Axes, chance: float | None) -> None:
    limits = [*ax.get_xlim(), *ax.get_ylim()]
    ends = [min(limits), max(limits)]
    ax.plot(ends, ends, color="0.5", linewidth=0.8)
    if chance is not None:
        draw_chance_line(ax, chance)
        ax.axvline(chance, color="black", linewidth=1, linestyle=":")


def _draw_differences(ax: Axes, rows: pd.DataFrame, colors: Mapping[Any, str]) -> None:
    for (line, weights), of in rows.groupby(["line", "weights"], sort=False):
        of = of.sort_values("depth")
        color, style = colors[line], "--" if weights == "untrained" else "-"
        label = f"{picture_name(line, 40)}, {weights} (n = {of['n'].max()})"
        ax.plot(of["depth"], of["difference"], style, color=color, linewidth=1.2, label=label)
        ax.fill_between(of["depth"], of["low"], of["high"], color=color, alpha=0.18, linewidth=0)
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_title("coupling of each layer: mean difference, 95 %", fontsize="small")
    ax.set_xticks(layer_ticks(int(rows["depth"].max())))
    ax.set_xlabel("layer", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.legend(fontsize="xx-small", frameon=False)


def noise_curves(rows: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw trajectories' cosine and coupling over the level of noise on the embeddings (fig. 32).

    Args:
        rows: ``panel, line, level, median, q25, q75, n, undefined, chance``.
        title: stands above.

    Returns:
        The figure.
    """
    x_label = "noise, relative to the embeddings' norm"
    return curves(rows, x="level", x_label=x_label, log_x=True, title=title)
