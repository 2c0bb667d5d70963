"""Curves over depth or training, and bars side by side: medians over documents with quartiles.

All functions take rows of :func:`coupling_analysis.study_tables.quartiles` with the columns
``panel`` (label of the y axis), ``line`` (name in the legend) and ``chance`` (NaN or missing where
there is none). Untrained weights are dashed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_eval_coupling.figures.canvas import (
    add_caption,
    add_legend,
    draw_chance_line,
    label_y_axis,
    layer_ticks,
    make_grid,
    picture_name,
    set_title,
    split_panels,
)
from lm_eval_coupling.figures.palette import assign_colors

_MOST_MARKERS = 12  # points of a curve


def curves(
    rows: pd.DataFrame,
    *,
    x: str = "depth",
    x_label: str = "layer",
    log: Collection[str] = (),
    log_x: bool = False,
    columns: int = 3,
    title: str | None = None,
    share_y: bool = False,
) -> Figure:
    """Draw medians with quartiles as a band, one panel per measure, one line per run.

    A line is interrupted where nothing is defined; a panel without any number is named in the title
    instead. The legend states the number of documents, and how many are undefined. Models with
    different numbers of layers are drawn over relative depth, from 0 to 1.

    Args:
        rows: see the module, with the column ``x``.
        x: column of the horizontal axis.
        x_label: name of the horizontal axis.
        log: panels with a logarithmic y axis.
        log_x: use a logarithmic x axis; it is linear below the smallest positive value if there
            is a 0.
        columns: panels side by side.
        title: stands above.
        share_y: use one y axis for all panels.

    Returns:
        The figure.
    """
    layers = rows.groupby("line")["depth"].max().apply(np.ceil) if x == "depth" else pd.Series()
    is_relative = layers.nunique() > 1
    if is_relative:
        rows = rows.assign(depth=rows["depth"] / rows["line"].map(layers))
        x_label = f"{x_label} / number of layers"
    panels, empty = split_panels(rows, ["median"])
    figure, axes = make_grid(len(panels), columns=columns, title=title, share_y=share_y)
    add_caption(figure, empty)
    colors = assign_colors(rows["line"])
    names = legend_names(rows)
    for ax, panel in zip(axes, panels, strict=True):
        of = rows[rows["panel"] == panel]
        if log_x:  # before drawing, or the limits of the linear axis stay
            _set_log_x(ax, of[x])
        for key, curve in of.groupby(["line", "weights"], sort=False):
            _draw_curve(ax, curve.sort_values(x), x, colors[key[0]], names[key])
        _finish(ax, of)
        label_y_axis(ax, panel)
        ax.set_xlabel(x_label, fontsize="small")
        if panel in log:
            ax.set_yscale("log")
        if x == "depth" and not is_relative:
            ax.set_xticks(layer_ticks(int(layers.max())))
    add_legend(figure, axes)
    return figure


def _set_log_x(ax: Axes, x: pd.Series) -> None:
    if (x <= 0).any():
        ax.set_xscale("symlog", linthresh=x[x > 0].min())
    else:
        ax.set_xscale("log")


def _draw_curve(ax: Axes, curve: pd.DataFrame, x: str, color: str, name: str) -> None:
    ax.plot(
        curve[x],
        curve["median"],
        color=color,
        linestyle=_line_style(curve["weights"].iloc[0]),
        linewidth=1.3,
        marker="o" if len(curve) <= _MOST_MARKERS else None,
        markersize=3,
        label=name,
    )
    ax.fill_between(curve[x], curve["q25"], curve["q75"], color=color, alpha=0.18, linewidth=0)


def quartile_bars(rows: pd.DataFrame, *, columns: int = 2, title: str | None = None) -> Figure:
    """Draw each run's median with its quartiles as a bar, trained beside untrained weights.

    Args:
        rows: see the module, one per panel, line and weights.
        columns: panels side by side.
        title: stands above.

    Returns:
        The figure.
    """
    panels, empty = split_panels(rows, ["median"])
    lines = list(dict.fromkeys(rows["line"]))
    width = max(3.4, 0.5 * len(lines) + 2)
    figure, axes = make_grid(len(panels), width=width, height=3.6, columns=columns, title=title)
    add_caption(figure, empty)
    shift = {"trained": -0.12, "untrained": 0.12} if rows["weights"].nunique() > 1 else {}
    colors = assign_colors(["trained", "untrained"])
    for ax, panel in zip(axes, panels, strict=True):
        of = rows[rows["panel"] == panel]
        for weights, bars in of.groupby("weights", sort=False):
            ax.errorbar(
                bars["line"].map(lines.index) + shift.get(weights, 0),
                bars["median"],
                yerr=np.abs(bars[["q25", "q75"]].sub(bars["median"], axis=0)).T.to_numpy(),
                fmt="o" if weights == "trained" else "s",
                color=colors[weights],
                markersize=4,
                capsize=2,
                label=weights,
            )
        _finish(ax, of)
        ticks = [
            f"{picture_name(line, 24)}\n{_describe_sizes(of[of['line'] == line])}" for line in lines
        ]
        ax.set_xticks(range(len(lines)), ticks, fontsize="x-small")
        ax.tick_params(axis="x", labelrotation=30 if len(lines) > 3 else 0)
        ax.set_xlim(-0.5, len(lines) - 0.5)
        label_y_axis(ax, panel)
    add_legend(figure, axes)
    return figure


def singular_value_curves(
    rows: pd.DataFrame, fits: pd.DataFrame, *, title: str | None = None
) -> Figure:
    """Draw singular values over depth, and their inverses with the straight lines fitted to them.

    Args:
        rows: ``line, weights, k, depth, median, q25, q75, n`` of σ_k over documents.
        fits: ``line, weights, k, slope, intercept, r2`` of 1/σ_k over depth.
        title: stands above.

    Returns:
        The figure: for each line and weights a panel of σ_k and one of 1/σ_k.
    """
    runs = list(rows.groupby(["line", "weights"], sort=False))
    figure, axes = make_grid(2 * len(runs), width=3.8, columns=2, title=title)
    colors = assign_colors(rows["k"].unique())
    for ((line, weights), of), left, right in zip(runs, axes[::2], axes[1::2], strict=True):
        is_run = (fits["line"] == line) & (fits["weights"] == weights)
        fits_by_k = fits[is_run].set_index("k")
        for k, curve in of.sort_values("depth").groupby("k"):
            depth, median, fit = curve["depth"], curve["median"], fits_by_k.loc[k]
            style: dict[str, Any] = {"color": colors[k], "markersize": 3}
            band: dict[str, Any] = {"color": colors[k], "alpha": 0.18, "linewidth": 0}
            r2 = "" if np.isnan(fit["r2"]) else f", R² = {fit['r2']:.2f}"
            left.plot(depth, median, "o-", linewidth=1, label=f"k = {k}", **style)
            left.fill_between(depth, curve["q25"], curve["q75"], **band)
            right.plot(depth, 1 / median, "o", label=f"k = {k}{r2}", **style)
            right.plot(depth, fit["intercept"] + fit["slope"] * depth, color=colors[k], linewidth=1)
        left.set_yscale("log")
        left.set_ylabel("singular value σₖ", fontsize="small")
        right.set_ylabel("1 / σₖ and its line", fontsize="small")
        for ax in (left, right):
            set_title(ax, f"{line}, {weights} (n = {of['n'].max()})")
            ax.set_xlabel("layer", fontsize="small")
            ax.set_xticks(layer_ticks(int(of["depth"].max())))
            ax.tick_params(labelsize="small")
            ax.legend(fontsize="xx-small", frameon=False)
    return figure


def legend_names(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Name each line and weights for a legend, with the number of documents."""
    has_both = rows["weights"].nunique() > 1
    names = {}
    for (line, weights), of in rows.groupby(["line", "weights"], sort=False):
        suffix = f", {weights}" if has_both or weights == "untrained" else ""
        names[line, weights] = f"{picture_name(line)}{suffix} ({_describe_sizes(of)})"
    return names


def _describe_sizes(rows: pd.DataFrame) -> str:
    undefined = int(rows["undefined"].max())
    low, high = int(rows["n"].min()), int(rows["n"].max())
    n = f"n = {high}" if low == high or undefined else f"n = {low}–{high}"
    return n + (f", {undefined} undefined" if undefined else "")


def _line_style(weights: str) -> str:
    return "--" if weights == "untrained" else "-"


def _finish(ax: Axes, rows: pd.DataFrame) -> None:
    ax.tick_params(labelsize="small")
    for chance in rows["chance"].dropna().unique() if "chance" in rows else ():
        draw_chance_line(ax, chance)
