"""Text of others does nothing where it is written: no formula, no escape sequence, no markup."""

import io
import xml.etree.ElementTree as ElementTree

import matplotlib
import pandas as pd
import pytest

from lm_eval_coupling.safe_text import (
    for_csv,
    for_html,
    for_picture,
    for_terminal,
    frame_for_csv,
    one_line,
)

HOSTILE = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "a\x00b",
    "\u202egnp.exe",
    "\ud800",
    "$x",
    "$x$",
    "_hidden",
    "=1+1",
    "<script>alert(1)</script>",
    "\"&<>'",
    "\\$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_character_reaches_a_terminal(text):
    safe = for_terminal(text)
    assert all(c in "\n\t" or c.isprintable() for c in safe) and safe.encode()
    assert for_terminal("naïve 日本語 🧪\n\tx") == "naïve 日本語 🧪\n\tx"
    assert one_line("a\n\n b\tc") == "a b c"


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1"])
def test_no_cell_is_a_formula(cell):
    frame = pd.DataFrame({"=name": [cell, "plain"], "score": [-0.5, 1.0]})
    safe = pd.read_csv(io.StringIO(frame_for_csv(frame).to_csv(index=False)))
    assert safe.columns[0] == "'=name" and safe.iloc[0, 0].startswith("'")
    assert safe["score"].tolist() == [-0.5, 1.0] and safe.iloc[1, 0] == "plain"


def test_numbers_written_as_texts_stay():
    numbers = ["-1.5", "+3e-4", "-inf", "nan", ".5", "+", "-"]
    assert [for_csv(text) for text in numbers] == numbers


@pytest.mark.parametrize("text", [*HOSTILE, "a$b_c^{", "50% of $5 and $6", "\\$5$", "$\\frac{$"])
def test_pictures_draw_names_verbatim_and_legends_have_them(text):
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([0, 1], label=for_picture(text))
    (entry,) = axes.legend().get_texts()
    drawn, is_formula = entry._preprocess_math(entry.get_text())
    assert not is_formula and drawn.lstrip() == one_line(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_is_text(text):
    element = ElementTree.fromstring(f'<a b="{for_html(text)}">{for_html(text)}</a>')
    assert element.text == for_terminal(text) and not len(element)
