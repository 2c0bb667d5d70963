"""What `show` prints: every number right, every table within the terminal's width."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from saved_runs import record, save, task_summary

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.terminal import coupling_of_documents, show
from lm_eval_coupling.saved.tables import load_records


def printed(folder, task=None, doc=None, width=120, colour=False):
    out = io.StringIO()
    show(
        folder,
        task,
        doc,
        Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None),
    )
    assert colour or all(cell_len(line) <= width for line in out.getvalue().splitlines())
    return out.getvalue()


@pytest.fixture
def run(tmp_path):
    rows = [record(doc_id=i, prompt_index=p) for i in range(3) for p in range(2)]
    rows += [record(doc_id=7, reason="out of memory"), record(doc_id=8, reason="out of memory")]
    rows += [record("gsm", doc_id=i, layers=30) for i in range(2)]
    save(tmp_path, {"arc": task_summary(), "gsm": task_summary()}, rows=rows)
    return tmp_path


def test_overview(run):
    text = printed(run)
    assert "org/tiny" in text and "4 layers of width 64" in text
    assert "2 × out of memory" in text
    rows = [record(doc_id=i, prompt_index=p) for i in range(3) for p in range(2)]
    off = ~np.eye(4, dtype=bool)
    values = np.array([1 - row["normalized_miscoupling"][0][off].mean(dtype=float) for row in rows]).reshape(3, 2).mean(1)
    assert f"{values.mean():.4f} ± {values.std(ddof=1) / 3**0.5:.4f}" in text
    assert f"{values.mean() - (1 - 0.9487):+.4f}" in text
    worst = max(row["certificate"].max() for row in rows)
    assert f"{worst:.1e}" in text


def test_one_table_per_model(run):
    save(run, {"arc": task_summary()}, model="org/other", rows=[record()])
    text = printed(run)
    assert text.index("org/other") < text.index("org/tiny") and text.count("missing") == 2


def test_layer_profile(run):
    text = printed(run, "arc")
    assert "arc: mean miscoupling per layer, K = 10" in text and "gsm" not in text
    matrices = np.stack([record(doc_id=i, prompt_index=p)["normalized_miscoupling"][0] for i in range(3) for p in range(2)])
    assert f"{matrices[:, 1, [0, 2, 3]].mean():.4f}" in text and f"{matrices[:, [0, 1, 3], 2].mean():.4f}" in text


def test_matrix_of_a_document(run):
    text = printed(run, "gsm", 1)
    assert "Question 1: why is the sky blue?" in text and "token 4 of 5" in text
    cells = [line for line in text.splitlines() if re.fullmatch(r" *\d+( +\d+){30} *", line)]
    found = np.array([[int(cell) for cell in line.split()] for line in cells])
    expected = np.floor(record("gsm", doc_id=1, layers=30)["normalized_miscoupling"][0].astype(float) * 100)
    assert (found[:, 0] == np.arange(1, 31)).all() and (found[:, 1:] == expected).all()


def test_matrix_wraps_in_a_narrow_terminal(run):
    text = printed(run, "gsm", 1, width=60)
    assert len([line for line in text.splitlines() if re.match(r" 30 ", line)]) == 2


def test_matrix_is_coloured(run):
    text = printed(run, "gsm", 1, colour=True)
    assert "\x1b[37;48;2;68;1;84m  0" in text  # the diagonal: nothing uncoupled


def test_prompts_are_text_not_markup(tmp_path):
    row = record() | {"text": "x" * 500 + " [bold]not markup[/nothing] \x1b[31m", "kind": "context"}
    row["normalized_miscoupling"][0, 0, 1] = np.nan
    save(tmp_path, {"arc": task_summary()}, rows=[row | {"reason": "1 [pair] undefined"}])
    text = printed(tmp_path, "arc", 0)
    assert "[bold]not markup[/nothing]" in text and "1 [pair] undefined" in text and "  ?" in text
    assert "\x1b" not in text and "x" * 400 not in text


def test_a_document_without_a_matrix_says_why(run):
    text = printed(run, "arc", 7)
    assert "Note: out of memory" in text and "No layer-by-layer matrix" in text


def test_nothing_measured_is_no_error(tmp_path):
    save(tmp_path, {"arc": task_summary()}, rows=[record(reason="too short")])
    assert "1 × too short" in printed(tmp_path) and "per layer" in printed(tmp_path, "arc")


def test_unknown_tasks_and_documents_name_what_there_is(run):
    with pytest.raises(CouplingError, match="got task mmlu.*choose one of arc, gsm"):
        show(run, "mmlu")
    with pytest.raises(CouplingError, match="got document 5, which task arc does not have; choose one of 0, 1, 2, 7, 8"):
        show(run, "arc", 5)
    with pytest.raises(CouplingError, match="without a task"):
        show(run, None, 5)
    with pytest.raises(CouplingError, match="no coupling_"):
        (run / "empty").mkdir()
        show(run / "empty")


def test_coupling_is_that_of_the_measurement(run):
    measure = pytest.importorskip("lm_eval_coupling.measuring.prompt")
    one = load_records(run).query("task == 'gsm'").iloc[[0]]
    mean, error, n = coupling_of_documents(one, 30)
    assert n == 1 and np.isnan(error)
    assert mean == pytest.approx(measure.PromptCoupling.from_columns(one.iloc[0].to_dict()).coupling(30), abs=1e-6)


def test_nothing_heavy_is_imported():
    code = "import sys, lm_eval_coupling.report.terminal; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overview_is_legible_in_80_columns(run):
    lines = printed(run, width=80).splitlines()
    assert any(all(name in line for name in ("docs", "coupling", "chance", "excess", "worst error")) for line in lines)
