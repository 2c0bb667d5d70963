"""Parts that all pictures share: grids, captions, the chance line, legends, color bars.

Texts that may hold names of models or tasks are escaped, here or by :func:`picture_name`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.safe_text import for_picture, one_line

DPI = 200
_LETTERS_PER_INCH = 11  # of a title
_LEGEND_ROWS, _LEGEND_ROW = 4, 0.17  # rows that a figure has room for; inches of each further row
_TICKS = 8
_NAME_LETTERS = 80


def make_grid(
    panels: int,
    *,
    width: float = 3.4,
    height: float = 3.0,
    columns: int = 3,
    title: str | None = None,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``panels`` axes in rows of ``columns``; sizes are inches of one panel."""
    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    size = (width * columns + 0.6, height * rows + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for ax in axes[panels:]:
        ax.remove()
    if title:
        add_caption(figure, [title])
    return figure, axes[:panels]


def split_panels(rows: pd.DataFrame, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate panels that have a complete row from those that would be empty.

    Args:
        rows: One row per document and panel, which the column ``panel`` names.
        columns: A row is complete if it has a number in each of them.

    Returns:
        Names of the panels to draw, and a sentence for each of the others.

    Raises:
        CouplingError: if no panel has a number.
    """
    is_complete = rows[list(columns)].notna().all(axis=1)
    has_row = is_complete.groupby(rows["panel"], sort=False).any()
    drawn, empty = list(has_row.index[has_row]), list(has_row.index[~has_row])
    if not drawn:
        raise CouplingError(
            f"expected a document in which {', '.join(empty) or 'anything'} is defined, got none; "
            "the column `reason` of the tables says why"
        )
    return drawn, [f"{name}: undefined in all documents, not drawn" for name in empty]


def picture_name(name: object, width: int = 2 * _NAME_LETTERS) -> str:
    """Escape a name for a legend or label, cut the middle of a very long one, and wrap it."""
    text = one_line(name)
    if len(text) > _NAME_LETTERS:
        text = f"{text[: _NAME_LETTERS // 2]}…{text[-_NAME_LETTERS // 2 :]}"
    return "\n".join(map(for_picture, textwrap.wrap(text, width)))


def add_caption(figure: Figure, sentences: Sequence[str]) -> None:
    """Add sentences below the title (or as the title), wrapped to the width of the figure."""
    width = int(figure.get_figwidth() * _LETTERS_PER_INCH)
    wrapped = [line for text in sentences for line in textwrap.wrap(one_line(text), width)]
    lines = list(map(for_picture, wrapped))
    if lines:
        figure.suptitle("\n".join(filter(None, [figure.get_suptitle(), *lines])), fontsize="medium")


def draw_chance_line(ax: Axes, chance: float, *, vertical: bool = False) -> None:
    """Draw a dotted line across the panel; the legend names it."""
    draw = ax.axvline if vertical else ax.axhline
    draw(chance, color="black", linewidth=1, linestyle=":", label=f"chance {chance:.3f}")


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Add one legend below all panels, each name once; a long one makes the figure higher."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = 1 if max(map(len, entries)) > 60 or len(entries) < 3 else 2
        longer = math.ceil(len(entries) / columns) - _LEGEND_ROWS
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, longer))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            fontsize="x-small",
            frameon=False,
        )


def label_y_axis(ax: Axes, text: str) -> None:
    """Label the y axis, in several lines where one would be longer than a panel is high."""
    ax.set_ylabel(picture_name(text, 36), fontsize="small")


def set_title(ax: Axes, name: str, *lines: str) -> None:
    """Put a name above a panel, with further lines below it."""
    ax.set_title("\n".join(picture_name(line, 44) for line in (name, *lines)), fontsize="small")


def layer_ticks(layers: int) -> list[int]:
    """Return the first layer and the multiples of a round number."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= _TICKS * step)
    return sorted({1, *range(step, layers + 1, step)})


def draw_color_bar(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str, chance: float
) -> None:
    """Draw the color bar beside the panels, with the chance level marked."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, label=label)
    bar.ax.axhline(chance, color="black", linewidth=2)
    bar.ax.text(
        -0.2,  # in widths of the bar; y is on its scale
        chance,
        f"chance\n{chance:.3f}",
        transform=bar.ax.get_yaxis_transform(),
        ha="right",
        va="center",
        fontsize="small",
    )
