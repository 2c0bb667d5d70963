"""The numbers of studies, by hand."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from coupling_analysis import by_document, prompt_matrices, study_tables
from coupling_analysis.matrix_figures import normalized_miscoupling
from coupling_analysis.missing_documents import describe_missing
from coupling_analysis.spectra_by_layer import fit_inverses
from coupling_analysis.token_pairs import mean_token_pairs
from studied import PAIRS, pair_rows, record, save

from lm_eval_coupling import measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.miscoupling import miscoupling

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_coupling_of_layers_by_hand(tmp_path):
    records = study_tables.read([save(tmp_path, [record(0)])])
    actual = study_tables.long(
        records, ["coupling", "layer_coupling", "layer_coupling_as_basis"], 10
    )
    values = {name: of["value"].tolist() for name, of in actual.groupby("measure")}
    assert values["coupling"] == pytest.approx([1 - 3.5 / 6])
    assert values["layer_coupling"] == pytest.approx([0.7, 0.3, 0.25])  # 1 − mean over a row
    assert values["layer_coupling_as_basis"] == pytest.approx([0.2, 0.65, 0.4])  # over a column
    assert actual[actual["measure"] == "layer_coupling"]["depth"].tolist() == [1, 2, 3]


def test_prompts_of_one_document_count_once(tmp_path):
    rows = [
        record(0),
        record(0, prompt_index=1, line_shape_score=2.5),
        record(1, line_shape_score=4.0),
    ]
    actual = study_tables.long(study_tables.read([save(tmp_path, rows)]), ["line_shape_score"], 10)
    assert actual["value"].tolist() == [2.0, 4.0]
    (summary,) = study_tables.quartiles(actual, study_tables.RUN).to_dict("records")
    assert (summary["mean"], summary["q25"], summary["median"], summary["q75"], summary["n"]) == (
        3,
        2.5,
        3,
        3.5,
        2,
    )
    assert summary["stderr"] == pytest.approx(1.0)  # √2 / √2


def test_windows_stand_at_their_centres_and_points_before_blocks(run):
    actual = study_tables.long(
        study_tables.read([run]), ["windowed_line_shape", "norms", "step_lengths"], 10
    )
    depths = {name: sorted(of["depth"].unique()) for name, of in actual.groupby("measure")}
    assert depths == {
        "windowed_line_shape": [1, 2],
        "norms": [0, 1, 2, 3],
        "step_lengths": [1, 2, 3],
    }


def test_what_is_undefined_is_counted_and_left_out_of_means(tmp_path):
    holes = np.stack([PAIRS, PAIRS])
    holes[0, 0] = np.nan
    records = study_tables.read(
        [save(tmp_path, [record(0), record(1, normalized_miscoupling=holes)])]
    )
    rows = study_tables.quartiles(
        study_tables.long(records, ["layer_coupling"], 10), study_tables.RUN
    )
    assert rows["n"].tolist() == [1, 2, 2] and rows["undefined"].tolist() == [1, 0, 0]
    ((mean, n),) = study_tables.mean_matrices(records, 10).values()
    assert n == 2 and np.isnan(np.diag(mean)).all() and mean[0, 1] == pytest.approx(0.2)


def test_paired_differences_by_hand():
    rows = pair_rows(plain={"a": 0.1, "b": 0.2, "c": 0.9}, cot={"b": 0.5, "a": 0.2, "d": 0.0})
    pairs = by_document.pair_documents(rows, "plain", "cot").set_index("doc_hash")
    assert pairs["difference"].to_dict() == pytest.approx({"a": 0.1, "b": 0.3})
    (mean,) = by_document.mean_differences(pairs.reset_index()).to_dict("records")
    assert mean["difference"] == pytest.approx(0.2) and mean["stderr"] == pytest.approx(0.1)
    assert mean["low"] == pytest.approx(
        0.2 - 12.7062 * 0.1, abs=1e-5
    )  # Student's t with one degree of freedom
    assert (mean["n"], mean["positive"]) == (2, 1.0)
    with pytest.raises(
        CouplingError, match=r"got no document in both of plain \(3\) and other \(1\)"
    ):
        by_document.pair_documents(pd.concat([rows, pair_rows(other={"z": 0.0})]), "plain", "other")


def test_bins_hold_equal_shares_and_correlations_know_their_sign():
    x = np.arange(12.0)
    about = {
        "model": "m",
        "revision": "main",
        "weights": "trained",
        "task": "t",
        "measure": "coupling",
    }
    rows = pd.DataFrame(
        about | {"doc_hash": f"{i}", "value": -v, "n_tokens": v} for i, v in enumerate(x)
    )
    bins = by_document.bin_documents(rows, "n_tokens", 3)
    assert bins["n"].tolist() == [4, 4, 4] and bins["n_tokens"].tolist() == [1.5, 5.5, 9.5]
    assert bins["median"].tolist() == [-1.5, -5.5, -9.5]
    assert len(by_document.bin_documents(rows.assign(n_tokens=x // 6), "n_tokens", 3)) == 2, (
        "a level is a bin"
    )
    (actual,) = by_document.correlations(rows, "n_tokens").to_dict("records")
    assert actual["coefficient"] == pytest.approx(-1) and actual["n"] == 12


def test_the_line_through_inverse_singular_values():
    depth = np.arange(1.0, 6.0)
    about = {"model": "m", "revision": "main", "weights": "trained", "k": 2}
    (fit,) = fit_inverses(
        pd.DataFrame(about | {"depth": depth, "median": 1 / (3 + 0.5 * depth)})
    ).to_dict("records")
    assert (fit["slope"], fit["intercept"], fit["r2"]) == pytest.approx((0.5, 3, 1))
    (fit,) = fit_inverses(pd.DataFrame(about | {"depth": depth, "median": 0.0})).to_dict("records")
    assert math.isnan(fit["slope"])


def test_token_pairs_are_averaged_from_the_end_of_the_prompt(tmp_path):
    longer = {"n_tokens": 9, "tokens": tuple(range(9)), "position": 8, "self_tokens": (7, 8)}
    records = study_tables.read([save(tmp_path, [record(0), record(1, shift=0.1, **longer)])])
    actual = mean_token_pairs(records, "self", 10)
    assert (actual.tokens, actual.layers, actual.n) == ([-2, -1], [1, 2, 3], 2)
    assert actual.miscoupling[0, 1, 1, 0] == pytest.approx(
        0.06 + 0.05
    )  # entry 1·4 + 2 of the first rank, and half the shift
    assert actual.by_layers()[0, 0] == pytest.approx((0.01 + 0.02) / 2 + 0.05)
    row = actual.rows().query(
        "jacobian_layer == 1 and basis_layer == 2 and jacobian_token == -1 and basis_token == -2"
    )
    assert row["miscoupling"].item() == pytest.approx(0.11)
    three = record(2, self_tokens=(3, 4, 5), self_miscoupling=np.zeros((2, 3, 3, 3, 3), np.float32))
    with pytest.raises(CouplingError, match="got prompts with 2 to 3 tokens for self-coupling"):
        mean_token_pairs(
            study_tables.read([save(tmp_path / "more", [record(0), three])]), "self", 10
        )


def test_coupling_matrices_are_those_of_the_measurement(tmp_path):
    model = prompt_matrices.load_model(tiny.save_model(tmp_path, num_hidden_layers=4))
    ids = model.encode("The sky is blue.")
    (expected,) = measure_coupling(model, [ids], ranks=[4], progress=False)
    actual = prompt_matrices.layer_matrices(model, ids, [1, 3], -1, 4)
    m = miscoupling(torch.as_tensor(actual.A), normalized=True).numpy()
    np.testing.assert_allclose(normalized_miscoupling(actual.A), m, atol=1e-6)
    assert m == pytest.approx(expected.normalized_miscoupling[0][np.ix_([0, 2], [0, 2])], abs=1e-4)
    assert np.diagonal(actual.A[1, 1]) == pytest.approx(expected.singular_values[2], rel=1e-5)
    outputs = prompt_matrices.token_matrices(model, ids, 2, [-3, -1], 4, "context_output")
    last = prompt_matrices.token_matrices(model, ids, 2, [-1], 4, "self")
    assert outputs.names == ["token 14 → 16", "token 16 → 16"]
    assert np.abs(outputs.A[1, 1]) == pytest.approx(np.abs(last.A[0, 0]), abs=1e-5)
    with pytest.raises(CouplingError, match="got layer 9, expected 1 to 4"):
        prompt_matrices.layer_matrices(model, ids, [9], -1, 4)
    with pytest.raises(CouplingError, match="which transformers cannot load"):
        prompt_matrices.load_model(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("doc_hash,p\nd1,0.2\nd1,0.8\n", "several rows of document d1, expected one row"),
        ("doc_hash,p\nd1,0.2\nd2,high\n", "got 'high' as p of document d2"),
        ('doc_hash,p\nd1,0.2\nd2,"1,200"\n', "got '1,200' as p of document d2"),
        ("doc,p\nd1,0.2\n", "expected one named doc_hash"),
    ],
)
def test_numbers_of_documents_are_refused_by_name(tmp_path, text, message):
    """Regression: the last of two rows counted, and text was no number without a word."""
    file = tmp_path / "x.csv"
    file.write_text(text)
    with pytest.raises(CouplingError, match=re.escape(message)):
        by_document.from_csv(file, "p")
    file.write_text("doc_hash,p\nd1,0.2\nd2,\n")
    numbers = by_document.from_csv(file, "p")
    assert numbers["d1"] == 0.2 and math.isnan(numbers["d2"])


def test_runs_of_other_tasks_are_named(tmp_path):
    """Regression: medians over different sets of tasks were drawn side by side without a note."""
    save(tmp_path / "a", [record(0, task="arc"), record(1, task="piqa")])
    save(tmp_path / "b", [record(0, task="arc")], model="org/other", fingerprint="g")
    records = study_tables.read([tmp_path])
    (sentence,) = describe_missing(records, ["coupling"])
    assert sentence == "not the same tasks in all: arc, piqa (tiny); arc (other)"
    assert not describe_missing(records[records["task"] == "arc"], ["coupling"])
