"""Matrices as images: miscoupling of pairs of tokens, and coupling matrices |A| themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures import canvas
from lm_eval_coupling.figures.canvas import caption, colour_bar, grid, labelled
from lm_eval_coupling.figures.palette import SCALE, UNDEFINED
from lm_eval_coupling.measures.formulas.headline import chance_level


def token_heatmaps(
    panels: Mapping[str, Float[np.ndarray, "token token"]],
    *,
    tokens: Mapping[str, Sequence[int]],
    rank: int,
    axes_names: tuple[str, str] = ("Jacobian at token", "singular vectors at token"),
    title: str | None = None,
) -> Figure:
    """Draw normalised miscoupling token by token, panels on one colour scale that marks chance (paper, figs. 18–23).

    What is not a number is grey; a panel without any number is named in the title instead.

    Args:
        panels: a matrix m̃[t, t'] under the name that stands above it.
        tokens: positions of each panel's tokens in the prompt, from 0.
        rank: number K of singular vectors they were measured with.
        axes_names: what rows and columns are.
        title: stands above all panels.

    Returns:
        The figure, not yet saved.

    Raises:
        CouplingError: if there is no panel, or none with a number.
    """
    finite = {name: matrix[np.isfinite(matrix)] for name, matrix in panels.items()}
    shown = {name: panels[name] for name, values in finite.items() if len(values)}
    if not shown:
        raise CouplingError(
            "got no pair of tokens with a number, expected at least one token-by-token matrix"
        )
    chance = chance_level(rank)
    values = np.concatenate([*finite.values(), [chance]])
    figure, axes = grid(len(shown), width=3.1, height=3.3, columns=4, title=title)
    caption(figure, [f"{name}: all undefined, not drawn" for name in panels if name not in shown])
    for ax, (name, matrix) in zip(axes, shown.items(), strict=True):
        image = ax.imshow(
            matrix, cmap=SCALE, vmin=values.min(), vmax=values.max(), interpolation="none"
        )
        ax.set_facecolor(UNDEFINED)
        undefined = np.isnan(matrix).sum()
        ax.set_title(
            name + (f"\n({undefined} undefined, grey)" if undefined else ""), fontsize="small"
        )
        ax.set_xticks(
            range(len(matrix)), [str(token) for token in tokens[name]], fontsize="x-small"
        )
        ax.set_yticks(
            range(len(matrix)), [str(token) for token in tokens[name]], fontsize="x-small"
        )
        ax.set_ylabel(axes_names[0], fontsize="small")
        ax.set_xlabel(axes_names[1], fontsize="small")
    colour_bar(figure, image, axes, rank, chance)
    return figure


def coupling_matrices(
    A: Float[np.ndarray, "row column rank rank"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str | None = None,
) -> Figure:
    """Draw |A| of every pair, each in units of its own largest entry (paper, figs. 3, 4, 18–23).

    A bright diagonal on a dark ground is coupling. Above each matrix stands its m̃; a matrix of zeros is grey.

    Args:
        A: coupling matrices; a row's Jacobian in a column's singular vectors.
        rows: names of the Jacobians.
        columns: names of the bases.
        title: stands above all.

    Returns:
        The figure, not yet saved.
    """
    figure = Figure(
        figsize=(1.55 * len(columns) + 1.4, 1.75 * len(rows) + 0.8),
        dpi=canvas.DPI,
        layout="constrained",
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    largest = np.abs(A).max(axis=(-2, -1), keepdims=True)
    shown = np.abs(A) / np.where(largest > 0, largest, np.nan)
    m = normalized_miscoupling(A)
    for (row, column), ax in np.ndenumerate(axes):
        image = ax.imshow(shown[row, column], cmap=SCALE, vmin=0, vmax=1, interpolation="none")
        ax.set_facecolor(UNDEFINED)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"m̃ = {m[row, column]:.3f}", fontsize="x-small")
        if column == 0:
            ax.set_ylabel(rows[row], fontsize="small")
        if row == len(rows) - 1:
            ax.set_xlabel(columns[column], fontsize="small")
    figure.supylabel("Jacobian", fontsize="small")
    rank = A.shape[-1]
    figure.supxlabel(
        f"singular vectors (K = {rank}; m̃ of chance: {chance_level(rank):.3f})", fontsize="small"
    )
    figure.colorbar(image, ax=axes, shrink=0.7, label="|A|, largest entry of each = 1")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def normalized_miscoupling(A: Float[np.ndarray, "*batch rank rank"]) -> Float[np.ndarray, "*batch"]:
    """m̃ = ‖A − Diag A‖_F / ‖A‖_F of every matrix, NaN where that is 0."""
    A = A.astype(np.float64)
    off = np.linalg.norm(np.where(np.eye(A.shape[-1], dtype=bool), 0, A), axis=(-2, -1))
    size = np.linalg.norm(A, axis=(-2, -1))
    return np.divide(off, size, out=np.full(size.shape, np.nan), where=size > 0)


def influence(
    panels: Mapping[str, Float[np.ndarray, "layer token"]],
    *,
    tokens: Sequence[str],
    label: str,
    title: str | None = None,
) -> Figure:
    """Draw a positive number of every layer and input token on one logarithmic scale; what is not positive is grey.

    Args:
        panels: a matrix under the name that stands above it.
        tokens: names of the columns.
        label: what the number is.
        title: stands above all panels.

    Returns:
        The figure, not yet saved.

    Raises:
        CouplingError: if no number is positive.
    """
    known = np.concatenate([matrix[matrix > 0] for matrix in panels.values()])
    if not known.size:
        raise CouplingError("got no positive number, expected the norm of at least one Jacobian")
    figure, axes = grid(len(panels), width=3.6, height=3.8, title=title)
    for ax, (name, matrix) in zip(axes, panels.items(), strict=True):
        extent = (-0.5, len(tokens) - 0.5, len(matrix) + 0.5, 0.5)
        shown = np.ma.masked_less_equal(np.nan_to_num(matrix), 0)
        image = ax.imshow(
            shown,
            cmap=SCALE,
            norm=LogNorm(known.min(), known.max()),
            interpolation="none",
            extent=extent,
            aspect="auto",
        )
        ax.set_facecolor(UNDEFINED)
        ax.set_title(name, fontsize="small")
        step = max(1, len(tokens) // 9)
        ax.set_xticks(
            [0, *range(len(tokens) - 1, 0, -step)],
            [tokens[0], *tokens[:0:-step]],
            fontsize="x-small",
        )
        ax.set_yticks(labelled(len(matrix)))
        ax.set_xlabel("input token (0: the measured one)", fontsize="small")
        ax.set_ylabel("layer", fontsize="small")
    figure.colorbar(image, ax=axes, label=label)
    return figure
