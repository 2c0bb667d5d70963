"""Every picture, drawn from measured numbers alone: one function per picture, each returns a matplotlib figure.

No pyplot, hence no global state: save with ``figure.savefig("name.png")``, the suffix choosing the format.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures import canvas
from lm_eval_coupling.figures.canvas import colour_bar, labelled
from lm_eval_coupling.figures.palette import SCALE
from lm_eval_coupling.measures.formulas.headline import chance_level


def layer_heatmaps(
    panels: Mapping[str, Float[np.ndarray, "layer layer"]], *, rank: int, title: str | None = None
) -> Figure:
    """Draw normalised miscoupling layer by layer, panels side by side on one colour scale.

    A row is the layer of the Jacobian, a column that of the singular vectors, both counted from 1. The diagonal, which
    is 0 by definition, is left blank, as is what is not a number. The colour bar marks the chance level.

    Args:
        panels: a matrix m̃[l, l'] under the name that stands above it.
        rank: number K of singular vectors they were measured with.
        title: stands above all panels.

    Returns:
        The figure; as data, each panel's image holds its matrix with the blank entries masked.

    Raises:
        CouplingError: if there is no panel, or one without a number off the diagonal.
    """
    masked = {name: _off_diagonal(name, matrix) for name, matrix in panels.items()}
    if not masked:
        raise CouplingError("got no panel to draw, expected at least one layer-by-layer matrix")
    chance = chance_level(rank)
    low = min(chance, *(matrix.min() for matrix in masked.values()))
    high = max(chance, *(matrix.max() for matrix in masked.values()))
    figure = Figure(
        figsize=(3.6 * len(masked) + 1.2, 4.1 if title else 3.8),
        dpi=canvas.DPI,
        layout="constrained",
    )
    axes = list(figure.subplots(1, len(masked), squeeze=False)[0])
    for ax, (name, matrix) in zip(axes, masked.items(), strict=True):
        image = _layer_image(ax, matrix, low, high)
        ax.set_title(f"{name}\nmean {matrix.mean():.3f}", fontsize="medium")
    axes[0].set_ylabel("Jacobian of layer")
    colour_bar(figure, image, axes, rank, chance)
    if title:
        figure.suptitle(title)
    return figure


def _off_diagonal(name: str, matrix: Float[np.ndarray, "layer layer"]) -> np.ma.MaskedArray:
    blank = np.eye(len(matrix), dtype=bool) | ~np.isfinite(matrix)
    if blank.all():
        raise CouplingError(
            f"got no number off the diagonal of {name!r}, expected a measured layer-by-layer matrix"
        )
    return np.ma.array(matrix, dtype=np.float64, mask=blank)


def _layer_image(ax: Axes, matrix: np.ma.MaskedArray, low: float, high: float) -> AxesImage:
    edges = 0.5, len(matrix) + 0.5  # cell l is centred on l
    image = ax.imshow(
        matrix, cmap=SCALE, vmin=low, vmax=high, interpolation="none", extent=(*edges, *edges[::-1])
    )
    ticks = labelled(len(matrix))
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.set_xlabel("singular vectors of layer")
    return image
