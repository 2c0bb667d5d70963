"""What the pictures have in common: panels in a grid, the line of chance, one legend, the bar of colours."""

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

_TICKS = 8
_LETTERS = 11  # of a title, in an inch
_LEGEND_ROWS, _LEGEND_ROW = 4, 0.17  # that a figure has room for, and inches of one more
DPI = 200  # of the pictures


def grid(
    panels: int,
    *,
    width: float = 3.4,
    height: float = 3.0,
    columns: int = 3,
    title: str | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure with as many axes as asked for, ``columns`` in a row; inches of one panel."""
    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    figure = Figure(
        figsize=(width * columns + 0.6, height * rows + 0.6), dpi=DPI, layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.remove()
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, axes[:panels]


def panels_of(rows: pd.DataFrame, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which panels are drawn, so that no axes stay empty.

    Returns:
        Those that have a number in all of these columns, and a sentence for each of the others.

    Raises:
        CouplingError: if none has.
    """
    known = rows[list(columns)].notna().all(axis=1).groupby(rows["panel"], sort=False).any()
    shown, empty = (
        [name for name, any_of in known.items() if any_of],
        [name for name, any_of in known.items() if not any_of],
    )
    if not shown:
        raise CouplingError(
            f"got no number of {', '.join(empty) or 'anything'} in any document, expected one; "
            "the column reason of the records says why"
        )
    return shown, [f"{name}: undefined in all documents, not drawn" for name in empty]


def caption(figure: Figure, sentences: Sequence[str]) -> None:
    """Sentences below the title of the figure, as wide as it is."""
    width = int(figure.get_figwidth() * _LETTERS)
    lines = [line for text in sentences for line in textwrap.wrap(text, width)]
    if lines:
        figure.suptitle("\n".join(filter(None, [figure.get_suptitle(), *lines])), fontsize="medium")


def chance_line(ax: Axes, chance: float) -> None:
    """A dotted line across the panel, named in the legend, where its name covers nothing."""
    ax.axhline(chance, color="black", linewidth=1, linestyle=":", label=f"chance {chance:.3f}")


def legend_outside(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them, each name once; a long one makes the figure higher, not the panels lower."""
    entries: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= {
            label: handle
            for handle, label in zip(handles, labels, strict=True)
            if label not in entries
        }
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


def label_beside(ax: Axes, words: str) -> None:
    """At the y axis, in two lines where one would be longer than a panel is high."""
    ax.set_ylabel(textwrap.fill(words, 36), fontsize="small")


def labelled(layers: int) -> list[int]:
    """The first layer and the multiples of a round number."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= _TICKS * step)
    return sorted({1, *range(step, layers + 1, step)})


def colour_bar(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], rank: int, chance: float
) -> None:
    """Beside the panels, with the chance level marked."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, label=f"normalised miscoupling, K = {rank}")
    bar.ax.axhline(chance, color="black", linewidth=2)
    beside = bar.ax.get_yaxis_transform()  # x in widths of the bar, y on its scale
    bar.ax.text(
        -0.2,
        chance,
        f"chance\n{chance:.3f}",
        transform=beside,
        ha="right",
        va="center",
        fontsize="small",
    )
