"""The typed reader of CSV files: facts, words, numbers of documents."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm_eval_coupling.errors import CouplingError, shown, why
from lm_eval_coupling.saved.bounded import read_text
from lm_eval_coupling.saved.fact_types import NUMBERS, to_date, typed_fact

_MISSING = ("", "na", "n/a", "nan", "none", "null")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Digits with separators or signs around them: a number to a reader, none to a program.
_NEARLY_A_NUMBER = re.compile(
    r"[$€£~≈<>]?\s*[+-]?(\d[\d.,'_\s]*(e[+-]?\d+)?|inf(inity)?)\s*%?", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class CsvFile:
    """A CSV file with a header; cells are texts without white space around them.

    Attributes:
        file: its path, for messages.
        columns: the names of the header.
        rows: by column; rows of nothing but separators are left out.
        lines: the number of each row's first line in the file, from 1.
    """

    file: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]

    def texts(self, column: str) -> list[str | None]:
        """Return the cells of a column, None for an empty one."""
        return [row[column] or None for row in self.rows]

    def numbers(self, column: str) -> list[float]:
        """Return the numbers of a column, NaN where none is given.

        Raises:
            CouplingError: for a cell that is no finite number, such as ``7b`` or ``1,000``.
        """
        values = []
        for position, row in enumerate(self.rows):
            value = to_number(row[column])
            if value is None or math.isinf(value):
                self.refuse(position, column, "a number such as 3e11")
            values.append(value)
        return values

    def facts(self, column: str, name: str) -> list[Any]:
        """Return the typed facts of a column, NaN or None where none is given.

        Args:
            column: name of the column.
            name: name of the fact, as :func:`~.fact_types.typed_fact` takes it.

        Raises:
            CouplingError: for a cell of another type.
        """
        is_of_numbers = name in NUMBERS
        values: list[Any] = []
        for position, row in enumerate(self.rows):
            cell = row[column]
            if cell.lower() in _MISSING:
                values.append(math.nan if is_of_numbers else None)
                continue
            number = to_number(cell) if is_of_numbers else None
            try:
                values.append(typed_fact(name, cell if number is None else number))
            except ValueError as error:
                self.refuse(position, column, str(error))
        return values

    def values(self, column: str) -> list[float] | list[str | None]:
        """Return a column's numbers if it has only such, else its texts.

        A column of dates, or of dates and years, has numbers of years.

        Raises:
            CouplingError: if some cells are numbers and others only look like numbers.
        """
        every_cell = [row[column] for row in self.rows]
        cells = [cell for cell in every_cell if cell.lower() not in _MISSING]
        if any(map(to_date, cells)) and not any(math.isnan(_year(cell)) for cell in cells):
            return [_year(cell) for cell in every_cell]
        are_numbers = [to_number(cell) is not None for cell in cells]
        look_like_numbers = [_NEARLY_A_NUMBER.fullmatch(cell) is not None for cell in cells]
        if cells and all(are_numbers):
            return self.numbers(column)
        if cells and all(look_like_numbers):
            return self.numbers(column)  # refuses the first that is none
        return self.texts(column)

    def refuse(self, position: int, column: str, expected: str) -> NoReturn:
        """Raise CouplingError for a cell, with the file, the line and the column."""
        raise CouplingError(
            f"got {self.file} with {shown(self.rows[position][column])} in the column {column} "
            f"(line {self.lines[position]}), expected {expected}"
        )


def read_csv(file: Path | str, needed: Sequence[str], of_what: str) -> CsvFile:
    """Read a CSV file.

    Args:
        file: UTF-8 text with a header, its cells separated by commas.
        needed: columns that it must have.
        of_what: its content, for messages, such as "facts".

    Returns:
        The header and the rows; a name of ``needed`` may be written with other case or blanks.

    Raises:
        CouplingError: if it cannot be read, lacks a column or names one twice, or a row has
            fewer cells than the header or more that are not empty.
    """
    file = Path(file)
    try:
        reader = csv.reader(io.StringIO(read_text(file, "utf-8-sig"), newline=""), strict=True)
        table = _numbered(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise CouplingError(
            f"got {file}, which is no readable CSV file of {of_what} ({why(error)})"
        ) from None
    table = [(line, row) for line, row in table if any(row)]
    if not table:
        raise CouplingError(f"got {file}, which is no readable CSV file of {of_what} (it is empty)")
    (_, header), *rows = table
    by_plain_name = {plain_name(name): name for name in needed}
    header = [by_plain_name.get(plain_name(name), name) for name in header]
    if missing := [name for name in needed if name not in header]:
        raise CouplingError(
            f"got {file} with the columns {', '.join(header)}, expected one named {missing[0]}"
            + ("; separate them by commas" if len(header) == 1 else "")
        )
    named = [name for name in header if name]
    if twice := [name for name in named if named.count(name) > 1]:
        raise CouplingError(f"got {file} with two columns {twice[0]!r}, expected one")
    width = len(header)
    for line, row in rows:
        if len(row) > width and any(row[width:]) or len(row) < width:
            raise CouplingError(
                f"got {file} with {len(row)} cells in line {line}, expected {width} as in the "
                "header; quote a cell that holds a comma"
            )
    columns = [(number, name) for number, name in enumerate(header) if name]
    return CsvFile(
        file,
        tuple(named),
        tuple({name: row[number] for number, name in columns} for _, row in rows),
        tuple(line for line, _ in rows),
    )


def _year(cell: str) -> float:
    """Return a date or a year as a number of years, NaN for any other cell."""
    number = to_number(cell)
    try:
        return typed_fact("released", cell if number is None else number)
    except ValueError:
        return math.nan


def _numbered(reader: Any) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV reader, each with its first line; quoted cells may span lines."""
    table, line = [], 1
    for row in reader:
        table.append((line, [cell.strip() for cell in row]))
        line = reader.line_num + 1
    return table


def plain_name(name: str) -> str:
    """Return a column's name in lower case with ``_`` for blanks and hyphens."""
    return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def to_number(text: str) -> float | None:
    """Return the number that a cell is, NaN for an empty cell or one such as "NA", else None."""
    if text.lower() in _MISSING:
        return math.nan
    return float(text) if _NUMBER.fullmatch(text) else None
