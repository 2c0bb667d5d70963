"""Pictures of studies over documents: a number of each against its coupling, the same ones twice, noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coupling_analysis.line_figures import curves
from lm_eval_coupling.figures.canvas import (
    caption,
    chance_line,
    grid,
    label_beside,
    labelled,
    panels_of,
)
from lm_eval_coupling.figures.palette import colours


def against_number(
    rows: pd.DataFrame,
    bins: pd.DataFrame,
    correlations: pd.DataFrame,
    *,
    x: str,
    x_label: str,
    title: str | None = None,
) -> Figure:
    """Draw every document's value over a number of it, the bins' medians with quartiles on top (paper, fig. 9).

    Args:
        rows: ``panel, line, value``, the column ``x``, and ``chance`` (NaN where there is none): one per document.
        bins: ``panel, line, q25, median, q75`` and the column ``x``.
        correlations: ``panel, line, coefficient, low, high, n`` of Spearman's correlation.
        x: column of the number.
        x_label: what it is.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    panels, empty = panels_of(rows, [x, "value"])
    figure, axes = grid(len(panels), width=3.6, title=title)
    caption(figure, empty)
    colour = colours(rows["line"])
    for ax, panel in zip(axes, panels, strict=True):
        of = rows[rows["panel"] == panel]
        for line, points in of.groupby("line", sort=False):
            ax.scatter(
                points[x], points["value"], s=5, color=colour[line], alpha=0.35, linewidths=0
            )
            binned = bins[(bins["panel"] == panel) & (bins["line"] == line)]
            sides = np.abs(binned[["q25", "q75"]].sub(binned["median"], axis=0)).T.to_numpy()
            found = correlations[
                (correlations["panel"] == panel) & (correlations["line"] == line)
            ].iloc[0]
            ax.errorbar(
                binned[x], binned["median"], yerr=sides, fmt="o-", color=colour[line], markersize=4, capsize=2, linewidth=1,
                markeredgecolor="black", markeredgewidth=0.4, label=f"{line}: {_rho(found)}",
            )  # fmt: skip
        for chance in of["chance"].dropna().unique():
            chance_line(ax, chance)
        label_beside(ax, panel)
        ax.set_xlabel(x_label, fontsize="small")
        ax.tick_params(labelsize="small")
        ax.legend(fontsize="xx-small", frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))
    return figure


def _rho(found: pd.Series) -> str:
    interval = "" if np.isnan(found["low"]) else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return (
        f"ρ = {found['coefficient']:+.2f}{interval}, n = {found['n']}"
        if found["n"] > 1
        else f"n = {found['n']}"
    )


def paired_differences(
    pairs: pd.DataFrame,
    by_layer: pd.DataFrame,
    *,
    names: tuple[str, str],
    chance: Mapping[str, float],
    title: str | None = None,
) -> Figure:
    """Draw the same documents in two tasks: each as a point of both values, and the mean difference at every layer.

    Args:
        pairs: ``panel, line, weights, first, second`` of the measures of whole prompts.
        by_layer: ``line, weights, depth, difference, low, high, n`` of the coupling of every layer.
        names: of the two tasks.
        chance: chance level of those panels that have one.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    panels, empty = panels_of(pairs, ["first", "second"])
    by_layer = by_layer.dropna(subset=["depth", "difference"])
    figure, axes = grid(len(panels) + bool(len(by_layer)), width=3.6, columns=2, title=title)
    caption(figure, empty)
    colour = colours(pairs["line"])
    for ax, panel in zip(axes, panels, strict=False):
        of = pairs[pairs["panel"] == panel].dropna(subset=["first", "second"])
        for (line, weights), points in of.groupby(["line", "weights"], sort=False):
            hollow: dict[str, Any] = (
                {"facecolors": "none", "edgecolors": colour[line]}
                if weights == "untrained"
                else {"color": colour[line]}
            )
            above = (points["second"] > points["first"]).mean()
            name = f"{line}, {weights} (n = {len(points)}, {above:.0%} higher)"
            ax.scatter(
                points["first"],
                points["second"],
                s=9,
                linewidths=0.6,
                alpha=0.7,
                label=name,
                **hollow,
            )
        _diagonal(ax, chance.get(panel))
        ax.set_title(panel, fontsize="small")
        ax.set_xlabel(names[0], fontsize="small")
        ax.set_ylabel(names[1], fontsize="small")
        ax.tick_params(labelsize="small")
        ax.legend(fontsize="xx-small", frameon=False)
    if len(by_layer):
        _differences(axes[-1], by_layer, colour)
    return figure


def _diagonal(ax: Axes, chance: float | None) -> None:
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color="0.5", linewidth=0.8)
    if chance is not None:
        chance_line(ax, chance)
        ax.axvline(chance, color="black", linewidth=1, linestyle=":")


def _differences(ax: Axes, rows: pd.DataFrame, colour: Mapping[Any, str]) -> None:
    for (line, weights), of in rows.groupby(["line", "weights"], sort=False):
        of, style = of.sort_values("depth"), "--" if weights == "untrained" else "-"
        name = f"{line}, {weights} (n = {of['n'].max()})"
        ax.plot(of["depth"], of["difference"], style, color=colour[line], linewidth=1.2, label=name)
        ax.fill_between(
            of["depth"], of["low"], of["high"], color=colour[line], alpha=0.18, linewidth=0
        )
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_title("coupling of each layer: mean difference, 95 %", fontsize="small")
    ax.set_xticks(labelled(int(rows["depth"].max())))
    ax.set_xlabel("layer", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.legend(fontsize="xx-small", frameon=False)


def noise(rows: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw what noise on the input embeddings does, over its level (paper, fig. 32).

    Args:
        rows: ``panel, line, level, median, q25, q75, n, undefined, chance``.
        title: stands above.

    Returns:
        The figure, not yet saved.
    """
    return curves(
        rows, x="level", x_label="noise, relative to the embeddings' norm", log_x=True, title=title
    )
