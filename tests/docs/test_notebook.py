"""The notebook runs from a saved run to the paper's figures, cell by cell."""

import json
from pathlib import Path

import pytest
import tiny
from saved_runs import record, save, task_summary

NOTEBOOK = Path(__file__).parents[2] / "docs" / "from_tables_to_figures.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch):
    if not NOTEBOOK.exists():
        pytest.skip("the notebook is not part of an installed package")
    rows = [record(doc_id=i, ranks=(4, 10)) for i in range(6)]
    rows += [record(doc_id=i, ranks=(4, 10), seed=1) | {"weights": "untrained"} for i in range(6)]
    save(tmp_path / "results", {"arc": task_summary()}, rows=rows, untrained={"seed": 0})
    monkeypatch.setenv("COUPLING_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COUPLING_MODEL", str(tiny.save_model(tmp_path / "model")))
    monkeypatch.setenv("COUPLING_FIGURES", str(tmp_path / "figures"))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        assert not cell.get("outputs"), f"cell {number} was saved with its outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert drawn == {
        "figure_1_layer_graph",
        "figure_3_coupling_matrices",
        "figure_5_regularity",
        "figure_15_layer_coupling",
    }
    assert len(names["runs"]) == 1 and set(names["records"]["weights"]) == {"trained", "untrained"}
