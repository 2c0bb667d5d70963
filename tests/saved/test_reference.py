"""The page of columns is that of the registry."""

from pathlib import Path

from coupling_analysis.measures_page import build_page

from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.saved.tables import table_columns

PAGE = Path(__file__).parents[2] / "docs" / "measures.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == build_page(), (
        "run: python -m coupling_analysis.measures_page > docs/measures.md"
    )


def test_every_column_and_reading_is_told():
    text = build_page()
    for name, column in table_columns().items():
        assert f"| `{name}` |" in text and column.doc
    assert all(f"`{name}" in text for name in readings())
