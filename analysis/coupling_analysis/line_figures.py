"""Curves over depth or training, and quartiles side by side: the median of the documents within its quartiles.

All of them take rows of :func:`coupling_analysis.study_tables.quartiles` with three columns more: ``panel`` (what stands
at its y axis), ``line`` (what stands in the legend) and, where there is one, ``chance``. What comes from untrained
weights is dashed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_eval_coupling.figures.canvas import (
    caption,
    chance_line,
    grid,
    label_beside,
    labelled,
    legend_outside,
    panels_of,
)
from lm_eval_coupling.figures.palette import colours


def curves(
    rows: pd.DataFrame,
    *,
    x: str = "depth",
    x_label: str = "layer",
    log: Collection[str] = (),
    log_x: bool = False,
    columns: int = 3,
    title: str | None = None,
) -> Figure:
    """Draw the median over documents with its quartiles as a band, one panel per measure, one line per run.

    Where nothing is defined the line is interrupted; a panel without any number is named in the title instead. The legend
    states the number of documents, and in how many a number of the curve is undefined.

    Args:
        rows: as the module says, with the column ``x``.
        x: column of the horizontal axis.
        x_label: what it is.
        log: panels with a logarithmic axis.
        log_x: whether the horizontal axis is logarithmic, too; down to the smallest positive value where it has a 0.
        columns: panels side by side.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    panels, empty = panels_of(rows, ["median"])
    figure, axes = grid(len(panels), columns=columns, title=title)
    caption(figure, empty)
    colour = colours(rows["line"])
    names = legend_names(rows)
    for ax, panel in zip(axes, panels, strict=True):
        of = rows[rows["panel"] == panel]
        if log_x:  # first, or limits of the linear axis stay
            smallest = of.loc[of[x] > 0, x].min()
            ax.set_xscale(
                **{"value": "symlog", "linthresh": smallest}
                if (of[x] <= 0).any()
                else {"value": "log"}
            )
        for (line, weights), curve in of.groupby(["line", "weights"], sort=False):
            curve = curve.sort_values(x)
            style: dict[str, Any] = {"color": colour[line], "linestyle": _style(weights)}
            marker = "o" if len(curve) <= 12 else None
            ax.plot(
                curve[x],
                curve["median"],
                **style,
                linewidth=1.3,
                marker=marker,
                markersize=3,
                label=names[line, weights],
            )
            ax.fill_between(
                curve[x], curve["q25"], curve["q75"], color=colour[line], alpha=0.18, linewidth=0
            )
        _finish(ax, of)
        label_beside(ax, panel)
        ax.set_xlabel(x_label, fontsize="small")
        if panel in log:
            ax.set_yscale("log")
        if x == "depth":
            ax.set_xticks(labelled(int(np.ceil(rows[x].max()))))
    legend_outside(figure, axes)
    return figure


def quartile_bars(rows: pd.DataFrame, *, columns: int = 2, title: str | None = None) -> Figure:
    """Draw the median of every run with its quartiles as a bar, trained beside untrained, one panel per measure.

    Args:
        rows: as the module says, one per panel, line and weights.
        columns: panels side by side.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    panels, empty = panels_of(rows, ["median"])
    lines = list(dict.fromkeys(rows["line"]))
    figure, axes = grid(
        len(panels), width=max(3.4, 0.5 * len(lines) + 2), height=3.6, columns=columns, title=title
    )
    caption(figure, empty)
    shift = {"trained": -0.12, "untrained": 0.12} if rows["weights"].nunique() > 1 else {}
    colour = colours(["trained", "untrained"])
    for ax, panel in zip(axes, panels, strict=True):
        of = rows[rows["panel"] == panel]
        for weights, bars in of.groupby("weights", sort=False):
            at = bars["line"].map(lines.index) + shift.get(weights, 0)
            sides = np.abs(bars[["q25", "q75"]].sub(bars["median"], axis=0)).T.to_numpy()
            marker = "o" if weights == "trained" else "s"
            ax.errorbar(
                at,
                bars["median"],
                yerr=sides,
                fmt=marker,
                color=colour[weights],
                markersize=4,
                capsize=2,
                label=weights,
            )
        _finish(ax, of)
        ax.set_xticks(
            range(len(lines)),
            [f"{line}\n{_sizes(of[of['line'] == line])}" for line in lines],
            fontsize="x-small",
        )
        ax.tick_params(axis="x", labelrotation=30 if len(lines) > 3 else 0)
        ax.set_xlim(-0.5, len(lines) - 0.5)
        label_beside(ax, panel)
    legend_outside(figure, axes)
    return figure


def singular_values(rows: pd.DataFrame, fits: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw singular values of the blocks with depth, and their inverses with the straight lines fitted to them.

    Args:
        rows: ``line, weights, k, depth, median, q25, q75, n``: of σ_k over documents.
        fits: ``line, weights, k, slope, intercept, r2`` of 1/σ_k against depth.
        title: stands above.

    Returns:
        One row of panels per line and weights: σ_k, and 1/σ_k with its fits.
    """
    runs = list(rows.groupby(["line", "weights"], sort=False))
    figure, axes = grid(2 * len(runs), width=3.8, columns=2, title=title)
    colour = colours(rows["k"].unique())
    for (run, of), left, right in zip(runs, axes[::2], axes[1::2], strict=True):
        fitted = fits[(fits["line"] == run[0]) & (fits["weights"] == run[1])].set_index("k")
        for k, curve in of.sort_values("depth").groupby("k"):
            depth = curve["depth"]
            style: dict[str, Any] = {"color": colour[k], "markersize": 3}
            left.plot(depth, curve["median"], "o-", linewidth=1, label=f"k = {k}", **style)
            left.fill_between(
                depth, curve["q25"], curve["q75"], color=colour[k], alpha=0.18, linewidth=0
            )
            right.plot(
                depth, 1 / curve["median"], "o", label=f"k = {k}{_r2(fitted['r2'][k])}", **style
            )
            right.plot(
                depth,
                fitted["intercept"][k] + fitted["slope"][k] * depth,
                "-",
                linewidth=1,
                color=colour[k],
            )
        left.set_yscale("log")
        left.set_ylabel("singular value σₖ", fontsize="small")
        right.set_ylabel("1 / σₖ and its line", fontsize="small")
        for ax in (left, right):
            ax.set_title(f"{run[0]}, {run[1]} (n = {of['n'].max()})", fontsize="small")
            ax.set_xlabel("layer", fontsize="small")
            ax.set_xticks(labelled(int(of["depth"].max())))
            ax.tick_params(labelsize="small")
            ax.legend(fontsize="xx-small", frameon=False)
    return figure


def _r2(value: float) -> str:
    return "" if np.isnan(value) else f", R² = {value:.2f}"


def legend_names(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Name of each line for the legend: with its weights where there are both, and its number of documents."""
    both = rows["weights"].nunique() > 1
    return {
        (
            line,
            weights,
        ): f"{line}{', ' + weights if both or weights == 'untrained' else ''} ({_sizes(of)})"
        for (line, weights), of in rows.groupby(["line", "weights"], sort=False)
    }


def _sizes(of: pd.DataFrame) -> str:
    undefined = int(of["undefined"].max())
    low, high = int(of["n"].min()), int(of["n"].max())
    n = f"n = {high}" if low == high or undefined else f"n = {low}–{high}"
    return n + (f", {undefined} undefined" if undefined else "")


def _style(weights: str) -> str:
    return "--" if weights == "untrained" else "-"


def _finish(ax: Axes, of: pd.DataFrame) -> None:
    ax.tick_params(labelsize="small")
    for chance in of["chance"].dropna().unique() if "chance" in of else ():
        chance_line(ax, chance)
