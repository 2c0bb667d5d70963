"""Tables that fit the width of a terminal: names wrap at word ends, spare columns are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lm_eval_coupling.safe_text import one_line

_GAP = 2  # spaces between columns
_NAME_WIDTH = 16  # characters that a column of names gets before spare columns are left out
_PART = re.compile(r"[^_\-/. ]*[_\-/. ]*")


class TextColumn:
    """One column of a table.

    Args:
        header: one or more words; each may take a line of its own.
        cells: values, shown by their ``str``.
        name: align left and wrap; numbers are aligned right and never broken.
        spare: 0 for a column that is always shown; the column with the highest number goes first.
    """

    def __init__(
        self, header: str, cells: Iterable[object], *, name: bool = False, spare: int = 0
    ) -> None:
        self.header = one_line(header)
        self.cells = [one_line(cell) for cell in cells]
        self.name, self.spare = name, spare

    @property
    def width(self) -> int:
        """Characters of the widest cell or word of the header."""
        return max(map(cell_len, [*self.header.split(), *self.cells]))


@dataclass(frozen=True)
class FittedTable:
    """A table, and the headers of the columns that it has no room for."""

    table: Table
    left_out: tuple[str, ...]


def fit_columns(
    columns: Sequence[TextColumn], width: int, *, sections: Iterable[object] = ()
) -> FittedTable:
    """Build a table of at most ``width`` characters, if its numbers allow that.

    Args:
        columns: from left to right.
        width: characters of the terminal.
        sections: a value per row; a line is drawn where it changes.

    Returns:
        The table, and the headers of the columns that were left out.
    """
    shown = list(columns)
    for column in sorted((c for c in columns if c.spare), key=lambda c: -c.spare):
        if _free_width(shown, width) >= 0:
            break
        shown.remove(column)
    names = [column for column in shown if column.name]
    room = max(_free_width(shown, width), 0) + sum(min(c.width, _NAME_WIDTH) for c in names)
    table = Table(
        box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    cells = []
    for column in shown:
        own = column.width
        if column.name:
            own = max(6, min(own, room // len(names)))
            room -= own
            names = names[1:]
        table.add_column(
            Text(column.header),
            justify="left" if column.name else "right",
            width=own,
            overflow="fold",
        )
        cells.append([wrap_name(c, own) if column.name else c for c in column.cells])
    marks = list(sections)
    for number, row in enumerate(zip(*cells, strict=True), start=1):
        ends = number < len(marks) and marks[number - 1] != marks[number]
        table.add_row(*map(Text, row), end_section=ends)
    return FittedTable(table, tuple(c.header for c in columns if c not in shown))


def _free_width(columns: Sequence[TextColumn], width: int) -> int:
    """Return the characters left when each name has its width, or ``_NAME_WIDTH`` of it."""
    taken = sum(min(c.width, _NAME_WIDTH) if c.name else c.width for c in columns)
    return width - taken - _GAP * (len(columns) - 1)


def wrap_name(name: str, width: int) -> str:
    """Wrap a name after ``_ - / .`` or a space; a longer word is left to be folded."""
    lines = [""]
    for part in filter(None, _PART.findall(name)):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
