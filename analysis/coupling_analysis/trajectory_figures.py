"""Token trajectories through the layers, in the principal components of their end points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import grid
from lm_eval_coupling.figures.palette import SCALE


def trajectories(
    prompts: Mapping[
        str, tuple[Float[np.ndarray, "_ _ component"], Float[np.ndarray, " component"]]
    ],
    *,
    token: Mapping[str, int] | None = None,
    skip: int = 0,
    components: tuple[int, int] = (1, 2),
    title: str | None = None,
) -> Figure:
    """Draw every token's way through the layers: all layers, the shallow half, the deep half (paper, fig. 12).

    Args:
        prompts: coordinates [token, point, component] and explained variance under the name of the row.
        token: index of the measured token under the same names; it is drawn thicker.
        skip: tokens left out at the start, such as an attention sink, whose way dwarfs the others'.
        components: the two that are drawn, from 1.
        title: stands above.

    Returns:
        The figure: one row per prompt, three panels each; colour is depth from 0, a dot the end of each part.

    Raises:
        CouplingError: if a prompt was too short for these components, or nothing is left of it.
    """
    for name, (coordinates, _) in prompts.items():
        tokens, _, known = coordinates.shape
        if not 1 <= min(components) <= max(components) <= known or skip >= tokens:
            raise CouplingError(
                f"got components {components} without {skip} tokens, but {name} has {known} components of {tokens} tokens; "
                "choose others, or a longer prompt"
            )
    xy = [component - 1 for component in components]
    figure, axes = grid(3 * len(prompts), width=3.2, columns=3, title=title)
    for row, (name, (coordinates, variance)) in enumerate(prompts.items()):
        points = coordinates.shape[1]
        depth = Normalize(0, points - 1)
        thick = token[name] - skip if token else None
        parts = {
            "all layers": (0, points),
            "shallow half": (0, points // 2 + 1),
            "deep half": (points // 2, points),
        }
        for ax, (part, (first, last)) in zip(
            axes[3 * row : 3 * row + 3], parts.items(), strict=True
        ):
            _draw(ax, coordinates[skip:, first:last, xy], np.arange(first, last), depth, thick)
            ax.set_title(f"{name}: {part}", fontsize="small")
            ax.set_xlabel(
                f"component {components[0]} ({variance[xy[0]]:.0%} of the last layer's variance)",
                fontsize="x-small",
            )
            ax.set_ylabel(f"component {components[1]} ({variance[xy[1]]:.0%})", fontsize="x-small")
        figure.colorbar(ScalarMappable(depth, SCALE), ax=axes[3 * row + 2], label="after layer")
    return figure


def _draw(
    ax: Axes,
    ways: Float[np.ndarray, "token point xy"],
    layers: np.ndarray,
    depth: Normalize,
    token: int | None,
) -> None:
    for index, way in enumerate(ways):
        thick = index == token
        steps = LineCollection(
            list(np.stack([way[:-1], way[1:]], axis=1)),
            cmap=SCALE,
            norm=depth,
            linewidths=2.2 if thick else 0.7,
            zorder=1 + thick,
        )
        steps.set_array((layers[:-1] + layers[1:]) / 2)
        ax.add_collection(steps)
    ax.scatter(ways[:, -1, 0], ways[:, -1, 1], s=6, color="black", zorder=3)
    ax.autoscale_view()
    ax.tick_params(labelsize="x-small")
