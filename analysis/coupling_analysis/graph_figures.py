"""Layers as a graph: nodes on a circle in order of depth, edges as strong as the coupling."""

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
from lm_eval_coupling.figures.canvas import layer_ticks, make_grid, set_title
from lm_eval_coupling.measures.formulas.headline import chance_coupling, chance_level

_EDGES = colormaps["viridis_r"]  # weak edges are bright, so that they fade into the ground
_WIDEST = 3.0  # points


def edge_weights(
    matrix: Float[np.ndarray, "layer layer"], rank: int
) -> Float[np.ndarray, "layer layer"]:
    """Return the coupling of two layers above chance, the mean of both orders; NaN on the diagonal.

    It is the chance level less the mean of m̃[l, l'] and m̃[l', l].
    """
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

    Pairs above chance have an edge; the panel's title counts them. Half of all unrelated pairs are
    above chance by accident: ``clear`` restricts edges to pairs that are so beyond their error.

    Args:
        panels: a matrix m̃[l, l'] under the name that stands above it.
        rank: number K of singular vectors.
        clear: pairs above chance beyond their error, by the same names.
        title: stands above all panels.

    Returns:
        The figure.

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
    figure, axes = make_grid(len(weights), width=3.6, height=3.8, title=title)
    scale = Normalize(0, max(np.nanmax(w, initial=0.0) for w in weights.values()) or 1.0)
    for ax, (name, w) in zip(axes, weights.items(), strict=True):
        upper = np.triu_indices(len(w), 1)
        undefined = np.isnan(w[upper]).sum()
        edges = w if clear is None else np.where(clear[name], w, np.nan)
        _draw_graph(ax, edges, scale)
        counts = f"{(edges[upper] > 0).sum()} of {len(upper[0])} pairs above chance"
        counts += "" if clear is None else " beyond error"
        counts += f", {undefined} undefined" if undefined else ""
        set_title(ax, name, counts)
    bar = figure.colorbar(ScalarMappable(scale, _EDGES), ax=axes, shrink=0.8)
    label = f"coupling above chance ({chance_coupling(rank):.3f}), K = {rank}"
    bar.set_label(label, fontsize="small")
    return figure


def _draw_graph(ax: Axes, weights: Float[np.ndarray, "layer layer"], scale: Normalize) -> None:
    layers = len(weights)
    angle = np.pi / 2 - 2 * np.pi * np.arange(layers) / layers  # clockwise from the top
    nodes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    pairs = [(a, b) for a in range(layers) for b in range(a) if weights[a, b] > 0]
    pairs.sort(key=lambda pair: weights[pair])  # the strongest on top
    values = np.array([weights[pair] for pair in pairs])
    strength = scale(values) if pairs else values
    edges = LineCollection(
        [nodes[[a, b]] for a, b in pairs],
        linewidths=_WIDEST * strength,
        colors=_EDGES(strength),
        alpha=0.85,
        zorder=1,
    )
    ax.add_collection(edges)
    ax.scatter(
        nodes[:, 0],
        nodes[:, 1],
        c=np.arange(layers),
        cmap="cividis",
        s=28,
        edgecolors="black",
        linewidths=0.5,
        zorder=2,
    )
    for layer in layer_ticks(layers):
        at = 1.13 * nodes[layer - 1]
        ax.annotate(str(layer), at, ha="center", va="center", fontsize="x-small")
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    ax.axis("off")
