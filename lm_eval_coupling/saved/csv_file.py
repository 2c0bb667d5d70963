"""The typed reader of CSV files: facts, words, numbers of documents."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lm_eval_coupling.errors import CouplingError, shown, why

_MISSING = ("", "na", "n/a", "nan", "none", "null")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Digits with separators or signs around them: a number to a reader, none to a program.
_NEARLY_A_NUMBER = re.compile(
    r"[$€£~≈<>]?\s*[+-]?(\d[\d.,'_\s]*(e[+-]?\d+)?|inf(inity)?)\s*%?", re.IGNORECASE
)
_TRUTHS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0", "0.0"), False),
}


@dataclasses.dataclass(frozen=True)
class CsvFile:
    """A CSV file with a header; cells are texts without white space around them.

    Attributes:
        file: its path, for messages.
        columns: the names of the header.
        rows: by column; rows of nothing but separators are left out.
        lines: the number of each row's line in the file, from 1.
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

    def sizes(self, column: str, *, allow_zero: bool = False, whole: bool = False) -> list[float]:
        """Return the numbers of a column, which are positive, NaN where none is given.

        Args:
            column: name of the column.
            allow_zero: accept 0 as well.
            whole: accept whole numbers only.

        Raises:
            CouplingError: for any other cell.
        """
        kind = "a positive whole number" if whole else "a positive number"
        values = self.numbers(column)
        for position, value in enumerate(values):
            is_whole = math.isnan(value) or value.is_integer()
            if value < 0 or (value == 0 and not allow_zero) or (whole and not is_whole):
                self.refuse(position, column, kind + " or 0" * allow_zero)
        return values

    def truths(self, column: str) -> list[bool | None]:
        """Return the truth values of a column, None where none is given.

        Raises:
            CouplingError: for a cell that is neither yes nor no in any common form.
        """
        values: list[bool | None] = []
        for position, row in enumerate(self.rows):
            is_missing = row[column].lower() in _MISSING
            value = None if is_missing else to_truth(row[column])
            if value is None and not is_missing:
                self.refuse(position, column, "yes or no")
            values.append(value)
        return values

    def values(self, column: str) -> list[float] | list[str | None]:
        """Return a column's numbers if it has only such, else its texts.

        Raises:
            CouplingError: if some cells are numbers and others only look like numbers.
        """
        cells = [row[column] for row in self.rows if row[column].lower() not in _MISSING]
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
            more or fewer cells than the header.
    """
    file = Path(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
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


def plain_name(name: str) -> str:
    """Return a column's name in lower case with ``_`` for blanks and hyphens."""
    return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def to_number(text: str) -> float | None:
    """Return the number that a cell is, NaN for an empty cell or one such as "NA", else None."""
    if text.lower() in _MISSING:
        return math.nan
    return float(text) if _NUMBER.fullmatch(text) else None


def to_truth(text: str) -> bool | None:
    """Return the truth value that a text such as "yes", "n" or "TRUE" is, else None."""
    return _TRUTHS.get(text.strip().lower())
