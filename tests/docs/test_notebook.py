"""The notebook runs from a saved run to the paper's figures, cell by cell."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from forked import forked_python
from lean_lm_eval import lean_lm_eval
from saved_runs import record, save, task_summary

NOTEBOOK = Path(__file__).parents[2] / "docs" / "from_tables_to_figures.ipynb"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run every cell with these variables; return the names that they leave."""

    def cells(**variables):
        if not NOTEBOOK.exists():
            pytest.skip("the notebook is not part of an installed package")
        variables |= {"COUPLING_FIGURES": tmp_path / "figures"}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
        assert notebook["nbformat"] == 4
        names: dict = {"__name__": "__main__"}
        for number, cell in enumerate(notebook["cells"]):
            assert not cell.get("outputs"), f"cell {number} was saved with its outputs"
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        return names

    return cells


def test_every_cell_runs(run, tmp_path):
    rows = [record(doc_id=i, ranks=(4, 10)) for i in range(6)]
    rows += [record(doc_id=i, ranks=(4, 10), seed=1) | {"weights": "untrained"} for i in range(6)]
    save(tmp_path / "results", {"arc": task_summary()}, rows=rows, untrained={"seed": 0})
    names = run(
        COUPLING_RESULTS=tmp_path / "results", COUPLING_MODEL=tiny.save_model(tmp_path / "model")
    )
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert drawn == {
        "figure_1_layer_graph",
        "figure_3_coupling_matrices",
        "figure_5_regularity",
        "figure_15_layer_coupling",
    }
    assert len(names["runs"]) == 1 and set(names["records"]["weights"]) == {"trained", "untrained"}


@pytest.mark.slow
def test_without_results_it_makes_a_run(run, tmp_path, monkeypatch):
    """As on a hosted notebook service, after its first cell has installed the package."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "executable", forked_python())
    monkeypatch.setenv("PYTHONPATH", lean_lm_eval())
    model = tiny.save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    names = run(COUPLING_RESULTS=tmp_path / "results", COUPLING_MODEL=model)
    assert {"coupling_demo"} <= {*names["runs"]["task"]} and len(names["records"])


def test_the_first_cell_installs_where_the_package_is_missing(monkeypatch):
    """The stand-in for pip takes its command; where the package is, nothing is started."""
    first = next(
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    )
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(first, {})
    ((python, *words),) = commands
    assert python == sys.executable
    assert words == ["-m", "pip", "install", "--quiet", "lm-eval-coupling[analysis]"]
