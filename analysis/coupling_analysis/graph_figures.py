"""Layers as a graph: on a circle in order of depth, an edge the stronger the more two layers are coupled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import grid, labelled
from lm_eval_coupling.measures.formulas.headline import chance_coupling, chance_level

_EDGES = colormaps["viridis_r"]
_WIDEST = 3.0  # points


def edge_weights(
    matrix: Float[np.ndarray, "layer layer"], rank: int
) -> Float[np.ndarray, "layer layer"]:
    """Coupling of two layers above chance: √(1 − 1/K) less the mean of m̃[l, l'] and m̃[l', l]; NaN on the diagonal."""
    weights = chance_level(rank) - (matrix + matrix.T) / 2
    np.fill_diagonal(weights, np.nan)
    return weights


def layer_graph(
    panels: Mapping[str, Float[np.ndarray, "layer layer"]],
    *,
    rank: int,
    clear: Mapping[str, Bool[np.ndarray, "layer layer"]] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the layers of every panel as a graph, all on one scale (paper, fig. 1c–e).

    Edges are coupling above chance, from 0; pairs below chance have none and are counted, and so are undefined ones.
    With ``clear`` only pairs have an edge that are above chance beyond their error: of unrelated layers half are above it.

    Args:
        panels: a matrix m̃[l, l'] under the name that stands above it.
        rank: number K of singular vectors they were measured with.
        clear: pairs above chance beyond their error, under the same names.
        title: stands above all panels.

    Returns:
        The figure, not yet saved.

    Raises:
        CouplingError: if there is no panel, or none with a number off the diagonal.
    """
    weights = {
        name: edge_weights(np.array(matrix, dtype=np.float64), rank)
        for name, matrix in panels.items()
    }
    if not any(np.isfinite(w).any() for w in weights.values()):
        raise CouplingError(
            "got no pair of layers with a coupling, expected at least one layer-by-layer matrix"
        )
    figure, axes = grid(len(weights), width=3.6, height=3.8, title=title)
    scale = Normalize(0, max(np.nanmax(w, initial=0.0) for w in weights.values()) or 1.0)
    for ax, (name, w) in zip(axes, weights.items(), strict=True):
        pairs = w[np.triu_indices(len(w), 1)]
        undefined = f", {np.isnan(pairs).sum()} undefined" if np.isnan(pairs).any() else ""
        beyond = "" if clear is None else " beyond error"
        w = w if clear is None else np.where(clear[name], w, np.nan)
        _draw(ax, w, scale)
        above = (w[np.triu_indices(len(w), 1)] > 0).sum()
        ax.set_title(
            f"{name}\n{above} of {len(pairs)} pairs above chance{beyond}{undefined}",
            fontsize="small",
        )
    chance = chance_coupling(rank)
    bar = figure.colorbar(ScalarMappable(scale, _EDGES), ax=axes, shrink=0.8)
    bar.set_label(f"coupling above chance ({chance:.3f}), K = {rank}", fontsize="small")
    return figure


def _draw(ax: Axes, weights: Float[np.ndarray, "layer layer"], scale: Normalize) -> None:
    layers = len(weights)
    angle = np.pi / 2 - 2 * np.pi * np.arange(layers) / layers  # clockwise from the top
    at = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    pairs = [(a, b) for a in range(layers) for b in range(a) if weights[a, b] > 0]
    pairs.sort(key=lambda pair: weights[pair])  # the strongest on top
    values = np.array([weights[pair] for pair in pairs])
    strength = scale(values) if pairs else values
    edges = LineCollection(
        [at[[a, b]] for a, b in pairs],
        linewidths=_WIDEST * strength,
        colors=_EDGES(strength),
        alpha=0.85,
        zorder=1,
    )
    edges.set_array(None)
    ax.add_collection(edges)
    ax.scatter(
        at[:, 0],
        at[:, 1],
        c=np.arange(layers),
        cmap="cividis",
        s=28,
        edgecolors="black",
        linewidths=0.5,
        zorder=2,
    )
    for layer in labelled(layers):
        ax.annotate(str(layer), 1.13 * at[layer - 1], ha="center", va="center", fontsize="x-small")
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    ax.axis("off")
