"""Coupling layer by layer as images.

Functions of this package return a matplotlib figure and use no pyplot, hence no global state: save
with ``figure.savefig("name.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import (
    DPI,
    add_caption,
    draw_color_bar,
    layer_ticks,
    picture_name,
)
from lm_eval_coupling.figures.palette import SCALE
from lm_eval_coupling.measures.formulas.headline import chance_coupling


def layer_heatmaps(
    panels: Mapping[str, Float[np.ndarray, "layer layer"]],
    *,
    rank: int,
    title: str | None = None,
    miscoupling: bool = False,
) -> Figure:
    """Draw coupling, 1 − m̃, layer by layer, panels side by side on one color scale.

    Rows are the layer of the Jacobian, columns that of the singular vectors, both from 1. The
    diagonal is left blank (it is 1 by definition), and so is what is undefined.

    Args:
        panels: a matrix m̃[l, l'], normalized miscoupling, under the name that stands above it.
        rank: number K of singular vectors.
        title: stands above all panels.
        miscoupling: draw m̃ itself.

    Returns:
        The figure. Each panel's image holds the drawn matrix, its blank entries masked.

    Raises:
        CouplingError: if there is no panel, or one without a number off the diagonal.
    """
    matrices = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in panels.items()}
    drawn = {name: _mask_blank(name, m if miscoupling else 1 - m) for name, m in matrices.items()}
    if not drawn:
        raise CouplingError("got no panel to draw, expected at least one layer-by-layer matrix")
    chance = 1 - chance_coupling(rank) if miscoupling else chance_coupling(rank)
    low = min(chance, *(matrix.min() for matrix in drawn.values()))
    high = max(chance, *(matrix.max() for matrix in drawn.values()))
    size = (3.6 * len(drawn) + 1.2, 4.1 if title else 3.8)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, len(drawn), squeeze=False)[0])
    for ax, (name, matrix) in zip(axes, drawn.items(), strict=True):
        image = _draw_layers(ax, matrix, low, high)
        ax.set_title(f"{picture_name(name, 36)}\nmean {matrix.mean():.3f}", fontsize="medium")
    axes[0].set_ylabel("Jacobian of layer")
    label = "normalized miscoupling" if miscoupling else "coupling"
    draw_color_bar(figure, image, axes, f"{label}, K = {rank}", chance)
    if title:
        add_caption(figure, [title])
    return figure


def _mask_blank(name: str, matrix: Float[np.ndarray, "layer layer"]) -> np.ma.MaskedArray:
    is_blank = np.eye(len(matrix), dtype=bool) | ~np.isfinite(matrix)
    if is_blank.all():
        raise CouplingError(
            f"got no number off the diagonal of {name!r}, expected a measured layer-by-layer matrix"
        )
    return np.ma.array(matrix, mask=is_blank)


def _draw_layers(ax: Axes, matrix: np.ma.MaskedArray, low: float, high: float) -> AxesImage:
    edges = 0.5, len(matrix) + 0.5  # cell l is centered on l
    extent = (*edges, *edges[::-1])
    image = ax.imshow(matrix, cmap=SCALE, vmin=low, vmax=high, interpolation="none", extent=extent)
    ticks = layer_ticks(len(matrix))
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.set_xlabel("singular vectors of layer")
    return image
