"""A document of which one prompt failed has no value: no reader averages over its other prompts."""

import numpy as np
import pytest
from saved_runs import record, save, task_summary

from lm_eval_coupling.fit.within_models import load_documents
from lm_eval_coupling.report.overview_rows import overview
from lm_eval_coupling.report.page import gather
from lm_eval_coupling.report.run_comparison import compare_runs
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values


def rows(failed_at):
    """One document of one prompt, and one of two of which the one with this number failed."""
    return [
        record(doc_id=0),
        *(
            record(doc_id=1, prompt_index=n, reason="out of memory" if n == failed_at else None)
            for n in (0, 1)
        ),
    ]


@pytest.fixture(params=[0, 1], ids=["first failed", "second failed"])
def folder(request, tmp_path):
    """A run of which one context of one document failed."""
    return save(tmp_path, {"arc": task_summary(n=1, failed=1)}, rows=rows(request.param))


def coupling_of_the_whole_document():
    pairs = record(doc_id=0)["normalized_miscoupling"][0].astype(float)
    return 1 - pairs[~np.eye(4, dtype=bool)].mean()


def test_means_over_documents(folder):
    ((_, table),) = find_runs(folder).with_tables()
    values = document_values(prompt_values(table))
    assert values["coupling@10"].isna().tolist() == [False, True]
    mean, _, n = mean_and_error(values["coupling@10"])
    assert (mean, n) == (pytest.approx(coupling_of_the_whole_document()), 1)


def test_show(folder):
    rows_shown = overview(find_runs(folder).with_tables(), [])
    assert rows_shown["documents"].tolist() == [1, 1]
    assert rows_shown["coupling"][0] == pytest.approx(coupling_of_the_whole_document())
    assert rows_shown["missing"][0] == "1 × out of memory"


def test_report(folder):
    pytest.importorskip("plotly")
    (table,) = gather(folder)["tables"]
    assert table["measured"] == 1 and table["total"] == 3
    profile = np.mean(table["profile"]["10"]["jacobian"])
    assert 1 - profile == pytest.approx(coupling_of_the_whole_document(), abs=1e-5)
    assert table["norms"] == pytest.approx(record(doc_id=0)["norms"].tolist(), rel=1e-5)


def test_fit_and_compare(folder, tmp_path):
    runs = load_runs(folder)
    documents = load_documents(find_runs(folder).runs, runs.assign(label=runs["model"]), [])
    by_document = documents.set_index("doc_hash")["coupling@10"]
    assert by_document.isna().to_dict() == {"d0": False, "d1": True}
    save(
        tmp_path,
        {"arc": task_summary()},
        model="org/other",
        rows=[record(doc_id=0, seed=1), record(doc_id=1, seed=1)],
        fingerprint="e" * 64,
        run_id="other",
    )
    compared = compare_runs(find_runs(tmp_path).with_tables(), [])
    assert compared["paired"].tolist() == [1, 1]
