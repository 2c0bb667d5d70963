"""Text of others made safe for where it goes: terminal, CSV, pictures, HTML and SVG.

Names of models and tasks, prompts and messages come from files that anybody may have written. They
are escaped by the function of their destination, once, where they are written.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Control characters (C0 without tab and newline, DEL, C1), marks that reorder the text around them,
# and halves of surrogate pairs, which have no UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.I)


def for_terminal(text: object) -> str:
    r"""Return the text with control characters written out, such as ``\x1b``.

    Newlines and tabs stay.

    The escape sequences of a terminal can clear it, set its title or write to its clipboard.
    """
    return _UNSAFE.sub(_written_out, str(text))


def one_line(text: object) -> str:
    """Return the text of :func:`for_terminal` on one line, every run of white space one blank."""
    return " ".join(for_terminal(text).split())


def for_csv(text: str) -> str:
    """Return the text of a cell that no spreadsheet takes for a formula: such a cell gets a ``'``.

    A text that is a number, such as ``-1.5``, or a sign alone stays as it is.
    """
    text = for_terminal(text)
    is_plain = len(text.strip()) < 2 or _NUMBER.fullmatch(text.strip())
    is_formula = text.lstrip(" ").startswith(_FORMULA) and not is_plain
    return f"'{text}" if is_formula else text


def frame_for_csv(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy of ``frame`` with :func:`for_csv` applied to its texts and column names."""
    columns = {
        name: frame[name].map(lambda cell: for_csv(cell) if isinstance(cell, str) else cell)
        for name in frame
        if not _is_numeric(frame[name])
    }
    return frame.assign(**columns).rename(columns=lambda name: for_csv(str(name)))


def for_picture(text: object) -> str:
    r"""Return the text as matplotlib draws it verbatim, on one line.

    ``$`` would begin a formula, and a label that begins with ``_`` is left out of legends.
    """
    escaped = one_line(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def for_html(text: object) -> str:
    """Return the text for the content or a quoted attribute of an HTML or SVG element."""
    return html.escape(for_terminal(text), quote=True)


def _written_out(character: re.Match[str]) -> str:
    code = ord(character[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _is_numeric(column: pd.Series) -> bool:
    return getattr(column.dtype, "kind", "O") in "biufc"
