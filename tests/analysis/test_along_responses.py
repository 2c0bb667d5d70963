"""Curves and slopes along responses, of records whose numbers are known."""

import json

import numpy as np
import pandas as pd
import pytest
import saved_runs
from coupling_analysis.along_responses import curves_along, read_along, slopes_along
from studied import record, save, script, table

from lm_eval_coupling.errors import CouplingError

pytestmark = pytest.mark.usefixtures("elsewhere")
LENGTH = 9


def token(doc_id, index, rises):
    """Line shape 1 + index/8 in right answers, and flat at 3 in wrong ones."""
    part = {"part_index": index, "part_length": LENGTH, "token_text": "x", "kind": "generated"}
    value = 1 + index / (LENGTH - 1) if rises else 3.0
    return record(doc_id, line_shape_score=value, place=index, **part)


@pytest.fixture
def written(tmp_path):
    """Documents 0 to 3 are right, 4 to 6 wrong; each is measured at five of nine tokens."""
    rows = [token(doc, index, doc < 4) for doc in range(7) for index in (0, 2, 4, 6, 8)]
    folder = save(tmp_path / "out", rows)
    inside = next(folder.rglob("*.parquet")).parent
    results = {
        "results": {"arc": {"alias": "arc", "exact_match,none": 4 / 7}},
        "configs": {"arc": {"task": "arc"}},
        "n-samples": {"arc": {"effective": 7}},
        "model_name": "org/tiny",
        "config": {},
    }
    (inside / f"results_{saved_runs.DATE}.json").write_text(json.dumps(results))
    samples = [
        {
            "doc_id": doc,
            "doc_hash": rows[5 * doc]["doc_hash"],
            "metrics": ["exact_match"],
            "exact_match": float(doc < 4),
            "filter": "none",
            "resps": [["text"]],
            "filtered_resps": ["text"],
        }
        for doc in range(7)
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (inside / f"samples_arc_{saved_runs.DATE}.jsonl").write_text(lines)
    return folder


def test_right_and_wrong_answers_have_curves_of_their_own(written):
    rows = read_along([written], ["line_shape_score"])
    assert len(rows) == 7 * 5 and rows["answer"].value_counts().to_dict() == {
        "right": 20,
        "wrong": 15,
    }
    curves = curves_along(rows, bins=4).set_index(["answer", "share"])
    right = curves.loc["right"]
    assert right.index.tolist() == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    assert right["mean"].tolist() == pytest.approx([1, 1.25, 1.5, 1.875])  # the last has two tokens
    assert right["n"].tolist() == [4] * 4 and (right["high"] - right["low"]).abs().max() < 1e-9
    assert curves.loc["wrong"]["mean"].tolist() == pytest.approx([3] * 4)
    slopes = slopes_along(rows).set_index("answer")
    assert slopes.loc["right", ["level", "slope", "n"]].tolist() == pytest.approx([1.5, 1, 4])
    assert slopes.loc["wrong", ["level", "slope", "n"]].tolist() == pytest.approx([3, 0, 3])


def test_intervals_are_over_documents_not_tokens():
    """Two tokens of a document in one bin are one value of it."""
    about = {"model": "m", "revision": "main", "weights": "trained", "task": "t"}
    about |= {"kind": "generated", "answer": "right", "measure": "coupling"}
    rows = pd.DataFrame(
        about | {"doc_hash": doc, "share": share, "value": value}
        for doc, value in (("a", 1.0), ("b", 3.0))
        for share in (0.0, 0.1)
    )
    (row,) = curves_along(rows, bins=1).itertuples()
    half = 12.706204736 * np.sqrt(2) / np.sqrt(2)
    assert (row.mean, row.n) == (2, 2) and row.high == pytest.approx(2 + half)
    assert slopes_along(rows)["slope"].isna().all()  # two tokens


def test_the_script_draws_them(written, tmp_path, capsys):
    script("along_responses")([str(written), "--out", str(tmp_path)])
    rows = table(tmp_path, "along_responses")
    assert set(rows["measure"]) == {"coupling", "line_shape_score"}
    assert {line.split(", ")[-1] for line in rows["line"]} == {"right", "wrong"}
    assert len(pd.read_csv(tmp_path / "along_responses_arc_tokens.csv")) == 2 * 7 * 5
    assert "right" in capsys.readouterr().out


def test_runs_without_tokens_of_responses_are_refused(run):
    with pytest.raises(CouplingError, match="coupling_position=generated-spread8"):
        read_along([run], ["coupling"])
