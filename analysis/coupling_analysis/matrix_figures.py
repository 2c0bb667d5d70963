"""Matrices as images: coupling of pairs of tokens, coupling matrices |A|, norms by input token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import (
    DPI,
    add_caption,
    draw_color_bar,
    layer_ticks,
    make_grid,
    set_title,
)
from lm_eval_coupling.figures.palette import SCALE, UNDEFINED
from lm_eval_coupling.measures.formulas.headline import chance_coupling


def token_heatmaps(
    panels: Mapping[str, Float[np.ndarray, "token token"]],
    *,
    tokens: Mapping[str, Sequence[int]],
    rank: int,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Draw coupling, 1 − m̃, token by token, panels on one color scale (paper, figs. 18–23).

    The color bar marks chance. Undefined entries are gray; a panel without any number is named in
    the title instead.

    Args:
        panels: a matrix m̃[t, t'], normalized miscoupling, under the name that stands above it.
        tokens: each panel's token positions in the prompt.
        rank: number K of singular vectors.
        title: stands above all panels.
        note: a sentence below the title.

    Returns:
        The figure.

    Raises:
        CouplingError: if there is no panel, or none with a number.
    """
    matrices = {name: 1 - matrix for name, matrix in panels.items()}
    finite = {name: matrix[np.isfinite(matrix)] for name, matrix in matrices.items()}
    drawn = {name: matrices[name] for name, values in finite.items() if len(values)}
    if not drawn:
        raise CouplingError(
            "got no pair of tokens with a number, expected at least one token-by-token matrix"
        )
    chance = chance_coupling(rank)
    values = np.concatenate([*finite.values(), [chance]])
    figure, axes = make_grid(len(drawn), width=3.1, height=3.3, columns=4, title=title)
    empty = [f"{name}: all undefined, not drawn" for name in panels if name not in drawn]
    add_caption(figure, [*([note] if note else []), *empty])
    for ax, (name, matrix) in zip(axes, drawn.items(), strict=True):
        image = ax.imshow(
            matrix, cmap=SCALE, vmin=values.min(), vmax=values.max(), interpolation="none"
        )
        ax.set_facecolor(UNDEFINED)
        undefined = np.isnan(matrix).sum()
        set_title(ax, name, *([f"({undefined} undefined, gray)"] if undefined else []))
        names = [str(token) for token in tokens[name]]
        ax.set_xticks(range(len(matrix)), names, fontsize="x-small")
        ax.set_yticks(range(len(matrix)), names, fontsize="x-small")
        ax.set_ylabel("Jacobian at token", fontsize="small")
        ax.set_xlabel("singular vectors at token", fontsize="small")
    draw_color_bar(figure, image, axes, f"coupling, K = {rank}", chance)
    return figure


def coupling_matrices(
    A: Float[np.ndarray, "row column rank rank"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str | None = None,
) -> Figure:
    """Draw |A| of every pair, relative to its own largest entry (paper, figs. 3, 4, 18–23).

    A bright diagonal on a dark ground is coupling, which stands above each matrix. A matrix of
    zeros is gray.

    Args:
        A: coupling matrices; a row's Jacobian in a column's singular vectors.
        rows: names of the Jacobians.
        columns: names of the bases.
        title: stands above all.

    Returns:
        The figure.
    """
    size = (1.55 * len(columns) + 1.4, 1.75 * len(rows) + 0.8)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    largest = np.abs(A).max(axis=(-2, -1), keepdims=True)
    relative = np.abs(A) / np.where(largest > 0, largest, np.nan)
    coupling = 1 - normalized_miscoupling(A)
    for (row, column), ax in np.ndenumerate(axes):
        image = ax.imshow(relative[row, column], cmap=SCALE, vmin=0, vmax=1, interpolation="none")
        ax.set_facecolor(UNDEFINED)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"coupling {coupling[row, column]:.3f}", fontsize="x-small")
        if column == 0:
            ax.set_ylabel(rows[row], fontsize="small")
        if row == len(rows) - 1:
            ax.set_xlabel(columns[column], fontsize="small")
    rank = A.shape[-1]
    chance = f"K = {rank}; coupling by chance: {chance_coupling(rank):.3f}"
    figure.supylabel("Jacobian", fontsize="small")
    figure.supxlabel(f"singular vectors ({chance})", fontsize="small")
    figure.colorbar(image, ax=axes, shrink=0.7, label="|A|, largest entry of each = 1")
    if title:
        add_caption(figure, [title])
    return figure


def normalized_miscoupling(
    A: Float[np.ndarray, "*batch rank rank"],
) -> Float[np.ndarray, "*batch"]:
    """Return m̃ = ‖A − Diag A‖_F / ‖A‖_F of every matrix, NaN where the denominator is 0."""
    A = A.astype(np.float64)
    off = np.linalg.norm(np.where(np.eye(A.shape[-1], dtype=bool), 0, A), axis=(-2, -1))
    size = np.linalg.norm(A, axis=(-2, -1))
    return np.divide(off, size, out=np.full(size.shape, np.nan), where=size > 0)


def influence_heatmaps(
    panels: Mapping[str, Float[np.ndarray, "layer token"]],
    *,
    tokens: Sequence[str],
    label: str,
    title: str | None = None,
) -> Figure:
    """Draw a positive number for every layer and input token on one logarithmic scale.

    Entries that are not positive are gray.

    Args:
        panels: a matrix under the name that stands above it.
        tokens: names of the columns.
        label: name of the number.
        title: stands above all panels.

    Returns:
        The figure.

    Raises:
        CouplingError: if no entry is positive.
    """
    positive = np.concatenate([matrix[matrix > 0] for matrix in panels.values()])
    if not positive.size:
        raise CouplingError("got no positive number, expected the norm of at least one Jacobian")
    figure, axes = make_grid(len(panels), width=3.6, height=3.8, title=title)
    norm = LogNorm(positive.min(), positive.max())
    step = max(1, len(tokens) // 9)
    for ax, (name, matrix) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(
            np.ma.masked_less_equal(np.nan_to_num(matrix), 0),
            cmap=SCALE,
            norm=norm,
            interpolation="none",
            extent=(-0.5, len(tokens) - 0.5, len(matrix) + 0.5, 0.5),
            aspect="auto",
        )
        ax.set_facecolor(UNDEFINED)
        set_title(ax, name)
        # Labels go backward from the measured token, so that it always has one.
        places = [0, *range(len(tokens) - 1, 0, -step)]
        ax.set_xticks(places, [tokens[place] for place in places], fontsize="x-small")
        ax.set_yticks(layer_ticks(len(matrix)))
        ax.set_xlabel("input token (0: the measured one)", fontsize="small")
        ax.set_ylabel("layer", fontsize="small")
    figure.colorbar(image, ax=axes, label=label)
    return figure
