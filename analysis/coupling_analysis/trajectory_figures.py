"""Token trajectories through the layers, in principal components of their end points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import add_caption, make_grid, set_title
from lm_eval_coupling.figures.palette import SCALE

_OUTLIER = 10  # times the median extent of the tokens


def token_trajectories(
    prompts: Mapping[
        str, tuple[Float[np.ndarray, "_ _ component"], Float[np.ndarray, " component"]]
    ],
    *,
    token: Mapping[str, int] | None = None,
    skip: int | None = None,
    components: tuple[int, int] = (1, 2),
    title: str | None = None,
) -> Figure:
    """Draw each token's path: all layers, the shallow half, the deep half (paper, fig. 12).

    Color is depth, from 0; a dot marks the end of each part.

    Args:
        prompts: coordinates [token, point, component] and explained variance, by name of the row.
        token: index of the measured token, by the same names; it is drawn thicker.
        skip: number of tokens left out at the start. By default, tokens are left out whose path
            is more than ten times as long as the median one, such as an attention sink, and a
            sentence below the title says so.
        components: the two components that are drawn, from 1.
        title: stands above.

    Returns:
        The figure: one row per prompt, three panels each.

    Raises:
        CouplingError: if a prompt has no such components, or no token is left.
    """
    for name, (coordinates, _) in prompts.items():
        tokens, _, most = coordinates.shape
        if not 1 <= min(components) <= max(components) <= most or (skip or 0) >= tokens:
            raise CouplingError(
                f"got components {components} without {skip or 0} tokens, but {name} has {most} "
                f"components of {tokens} tokens; choose others, or a longer prompt"
            )
    xy = [component - 1 for component in components]
    figure, axes = make_grid(3 * len(prompts), width=3.2, columns=3, title=title)
    sentences = []
    for row, (name, (coordinates, variance)) in enumerate(prompts.items()):
        paths = coordinates[:, :, xy]
        kept = _ordinary_tokens(paths) if skip is None else np.arange(skip, len(paths))
        if skip is None and len(kept) < len(paths):
            sentences.append(_describe_outliers(name, paths, kept))
        points = coordinates.shape[1]
        depth = Normalize(0, points - 1)
        thick = np.flatnonzero(kept == token[name]).tolist() if token else []
        parts = {
            "all layers": (0, points),
            "shallow half": (0, points // 2 + 1),
            "deep half": (points // 2, points),
        }
        panels = axes[3 * row : 3 * row + 3]
        for ax, (part, (first, last)) in zip(panels, parts.items(), strict=True):
            _draw_paths(ax, paths[kept, first:last], np.arange(first, last), depth, thick)
            set_title(ax, f"{name}: {part}")
            shares = [f"component {c} ({variance[c - 1]:.0%}" for c in components]
            ax.set_xlabel(f"{shares[0]} of the last layer's variance)", fontsize="x-small")
            ax.set_ylabel(f"{shares[1]})", fontsize="x-small")
        figure.colorbar(ScalarMappable(depth, SCALE), ax=panels[-1], label="after layer")
    add_caption(figure, sentences)
    return figure


def _extents(paths: Float[np.ndarray, "token point xy"]) -> Float[np.ndarray, " token"]:
    """Return each token's largest distance from the median point of all tokens."""
    center = np.median(paths.reshape(-1, paths.shape[-1]), axis=0)
    return np.linalg.norm(paths - center, axis=-1).max(axis=-1)


def _ordinary_tokens(paths: Float[np.ndarray, "token point xy"]) -> Int[np.ndarray, " kept"]:
    extents = _extents(paths)
    return np.flatnonzero(extents <= _OUTLIER * np.median(extents))


def _describe_outliers(name: str, paths: np.ndarray, kept: np.ndarray) -> str:
    extents = _extents(paths)
    left_out = np.setdiff1d(np.arange(len(paths)), kept)
    times = extents[left_out].max() / np.median(extents)
    listed = ", ".join(str(token + 1) for token in left_out[:5])
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    return (
        f"{name}: token {listed}{more} left out, which goes up to {times:,.0f} times as far as the "
        "median token"
    )


def _draw_paths(
    ax: Axes,
    paths: Float[np.ndarray, "token point xy"],
    layers: Int[np.ndarray, " point"],
    depth: Normalize,
    thick: list[int],
) -> None:
    for index, path in enumerate(paths):
        is_thick = index in thick
        steps = LineCollection(
            list(np.stack([path[:-1], path[1:]], axis=1)),
            cmap=SCALE,
            norm=depth,
            linewidths=2.2 if is_thick else 0.7,
            zorder=1 + is_thick,
        )
        steps.set_array((layers[:-1] + layers[1:]) / 2)
        ax.add_collection(steps)
    ax.scatter(paths[:, -1, 0], paths[:, -1, 1], s=6, color="black", zorder=3)
    ax.autoscale_view()
    ax.tick_params(labelsize="x-small")
