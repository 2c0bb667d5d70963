"""The curve along responses in the report: numbers by hand, and the picture in a browser."""

import browser
import pytest
import saved_runs
from studied import record

from lm_eval_coupling.report.page import gather, write_report

LENGTH = 9


def token(doc_id, index, value):
    """Miscoupling of every pair of layers is ``value`` at this token of the response."""
    part = {"part_index": index, "part_length": LENGTH, "token_text": "x", "kind": "generated"}
    row = record(doc_id, place=index, **part)
    row["normalized_miscoupling"] = row["normalized_miscoupling"] * 0 + value
    return row


def saved(folder, rows, n_documents):
    """Save a run whose documents 0 and 1 are right."""
    where = saved_runs.save(folder, {"arc": saved_runs.task_summary()}, rows=rows)
    lines = [
        saved_runs.sample(f"d{doc}", doc_id=doc, acc=float(doc < 2)) for doc in range(n_documents)
    ]
    saved_runs.write_samples(where, "arc", lines)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Documents 0 and 1 are right and fall from 0.5 to 0.3; 2 is wrong and flat at 0.1."""
    rows = [token(doc, i, 0.5 + i / 40 + doc / 10) for doc in (0, 1) for i in (0, 1, 8)]
    rows += [token(2, i, 0.9) for i in (0, 8)]
    return saved(tmp_path / "out", rows, 3)


def test_right_and_wrong_answers_have_curves_over_documents(folder):
    (table,) = gather([folder])["tables"]
    curves = {curve["answer"]: curve for curve in table["responses"] if curve["rank"] == "10"}
    assert set(curves) == {"right", "wrong"}
    right = curves["right"]
    # The first two tokens of nine lie in two bins: 0/8 and 1/8.
    assert right["share"] == [1 / 16, 3 / 16, 15 / 16] and right["n"] == [2, 2, 2]
    assert right["mean"] == pytest.approx([0.45, 0.425, 0.25], abs=1e-5)
    assert right["stderr"] == pytest.approx([0.05] * 3, abs=1e-5)
    assert curves["wrong"]["mean"] == pytest.approx([0.1, 0.1], abs=1e-5)
    assert curves["wrong"]["stderr"] == [None, None]  # one document


def test_a_document_counts_once_in_a_bin(tmp_path):
    rows = [token(0, i, v) for i, v in ((0, 0.5), (8, 0.5), (7, 0.7))]
    rows += [token(1, 8, 0.9)]
    (table,) = gather([saved(tmp_path / "out", rows, 2)])["tables"]
    curve = next(curve for curve in table["responses"] if curve["rank"] == "10")
    assert curve["mean"][-1] == pytest.approx((0.4 + 0.1) / 2, abs=1e-5) and curve["n"][-1] == 2


def test_runs_without_responses_have_no_curve(tmp_path):
    rows = [record(doc) for doc in range(2)]
    (table,) = gather([saved(tmp_path / "out", rows, 2)])["tables"]
    assert table["responses"] == []


def test_the_picture(folder, tmp_path):
    if reason := browser.reason_to_skip():
        pytest.skip(reason)
    page = write_report([folder], tmp_path / "report.html")
    with browser.Browser() as window:
        window.open(page)
        window.click("#tab-layers")
        window.until("document.querySelector('#responses').data")
        names = window.run("document.querySelector('#responses').data.map(t => t.name)")
        assert "right (2 documents)" in names and "wrong (1 documents)" in names
        assert any(str(name).startswith("chance") for name in names)
        caption = window.run("document.querySelector('#responses-caption').innerText")
        assert "along the response" in caption
