"""Tables that fit their terminal: names wrap where a word ends, and columns are left out before a number breaks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

_BETWEEN = 2  # spaces between columns
_NAME = 16  # columns that a name should have before anything is left out for it
_PART = re.compile(r"[^_\-/. ]*[_\-/. ]*")


class TextColumn:
    """One column. ``name``: left, and wrapped where it must be; ``spare``: the higher, the earlier it is left out."""

    def __init__(
        self, header: str, cells: Iterable[object], *, name: bool = False, spare: int = 0
    ) -> None:
        self.header, self.cells, self.name, self.spare = (
            header,
            [str(cell) for cell in cells],
            name,
            spare,
        )

    @property
    def width(self) -> int:
        """Of its widest cell; a header of several words may take several lines."""
        return max(map(cell_len, [*self.header.split(), *self.cells]))


@dataclass(frozen=True)
class FittedTable:
    """A table, and the headers of the columns that it has no room for."""

    table: Table
    left_out: tuple[str, ...]


def fit_columns(
    shown: Sequence[TextColumn], width: int, *, sections: Iterable[object] = ()
) -> FittedTable:
    """A table of at most ``width`` columns of characters, if its numbers allow that.

    Args:
        shown: from left to right.
        width: of the terminal.
        sections: a value per row; where it changes, a line is drawn.

    Returns:
        The table, and the headers of the columns that were left out to keep within the width.
    """
    kept = list(shown)
    for column in sorted((c for c in shown if c.spare), key=lambda c: -c.spare):
        if _room(kept, width) >= 0:
            break
        kept.remove(column)
    names = [column for column in kept if column.name]
    room = max(_room(kept, width), 0) + sum(min(column.width, _NAME) for column in names)
    table = Table(
        box=None, padding=(0, _BETWEEN, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    for column in kept:
        own = max(6, min(column.width, room // len(names))) if column.name else column.width
        room -= own if column.name else 0
        names = names[1:] if column.name else names
        table.add_column(
            column.header,
            justify="left" if column.name else "right",
            width=own,
            no_wrap=False,
            overflow="fold",
        )
        if column.name:
            column.cells = [wrapped(cell, own) for cell in column.cells]
    marks = list(sections)
    for number, cells in enumerate(zip(*(column.cells for column in kept), strict=True)):
        table.add_row(
            *map(Text, cells),
            end_section=number + 1 < len(marks) and marks[number] != marks[number + 1],
        )
    return FittedTable(table, tuple(column.header for column in shown if column not in kept))


def _room(kept: Sequence[TextColumn], width: int) -> int:
    """Characters that are left when names have what they need, or what they should have."""
    taken = sum(min(column.width, _NAME) if column.name else column.width for column in kept)
    return width - taken - _BETWEEN * (len(kept) - 1)


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most ``width``, broken after ``_ - / .`` or a space; a longer word stays whole."""
    lines = [""]
    for part in filter(None, _PART.findall(name)):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
