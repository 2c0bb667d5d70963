"""Which records a study takes, and which it refuses."""

import math
import re

import pandas as pd
import pytest
from coupling_analysis import selection, study_tables
from studied import record, save

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.records import load_records
from lm_eval_coupling.saved.tables import require

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_of_a_prompt_measured_twice_the_newer_counts(tmp_path):
    save(tmp_path / "a", [record(0)], date="2025-01-01T00-00-00")
    save(tmp_path / "b", [record(0, shift=0.1), record(1)], date="2025-02-01T00-00-00")
    actual = study_tables.read([tmp_path / "b", tmp_path / "a"])
    assert actual["doc_id"].tolist() == [0, 1]
    assert actual["line_shape_score"].tolist() == pytest.approx([1.6, 1.5])


def test_tables_of_before_there_were_twins_are_trained(plain):
    assert study_tables.read([plain])["weights"].tolist() == ["trained", "trained"]
    with pytest.raises(
        CouplingError,
        match="none with untrained weights; measure again with coupling_untrained_seed=0",
    ):
        require(load_records(plain), [], weights="untrained")


@pytest.mark.parametrize(
    ("column", "option"),
    [
        ("line_shape_score", "measure again with coupling_measures=depth+regularity"),
        ("frobenius_norms", "measure again with coupling_measures=depth+regularity+spectra"),
        ("self_miscoupling", "coupling_measures=depth+regularity+self,coupling_tokens=last8"),
        (
            "context_input_miscoupling",
            "coupling_measures=depth+regularity+context,coupling_tokens=last8",
        ),
        ("trajectories", "coupling_trajectories=1"),
    ],
)
def test_a_measure_that_was_not_recorded(plain, column, option):
    message = f"got 2 records of arc with the measures depth, none with {column}; "
    with pytest.raises(CouplingError, match=re.escape(message) + ".*" + re.escape(option) + "$"):
        require(load_records(plain), ["normalized_miscoupling", column])


def test_records_that_lack_a_measure_are_left_out(tmp_path):
    save(tmp_path, [record(0), record(1, entropy=None), record(2, line_shape_score=math.nan)])
    assert require(load_records(tmp_path), ["entropy", "line_shape_score"])["doc_id"].tolist() == [
        0
    ]


def test_one_name_with_two_weights_is_refused(tmp_path):
    """Regression: documents measured before and after a training counted as one model's."""
    save(
        tmp_path / "a",
        [record(0), record(1, task="mmlu")],
        date="2025-01-01T00-00-00",
        fingerprint="before" * 5,
    )
    save(tmp_path / "b", [record(1)], date="2025-02-01T00-00-00", fingerprint="after" * 6)
    first, second = "beforebe of 2025-01-01T00-00-00", "afteraft of 2025-02-01T00-00-00"
    message = rf"got tiny with .* \(fingerprints {first} and {second}\), expected"
    with pytest.raises(CouplingError, match=message):
        study_tables.read([tmp_path])
    assert study_tables.read([tmp_path / "b"])["doc_id"].tolist() == [1]
    assert study_tables.read([tmp_path], ["mmlu"])["fingerprint"].tolist() == ["before" * 5]


def test_one_name_with_two_twins_is_refused(tmp_path):
    for seed in (0, 1):
        save(tmp_path / str(seed), [record(seed), record(seed, weights="untrained")], seed=seed)
    with pytest.raises(
        CouplingError, match="got untrained twins of tiny of the seeds 0 and 1, expected one"
    ):
        study_tables.read([tmp_path])
    assert study_tables.read([tmp_path / "1"])["untrained_seed"].tolist() == [None, 1]
    assert len(study_tables.read([tmp_path], weights="trained")) == 2


def test_revisions_and_old_tables_need_no_common_fingerprint(tmp_path):
    save(tmp_path, [record(0)], fingerprint="one", revision="step1")
    save(tmp_path, [record(0)], fingerprint="other", revision="step2")
    save(tmp_path, [record(0)], fingerprint="third")
    save(tmp_path / "old", [record(1)], fingerprint=None)
    assert len(study_tables.read([tmp_path])) == 4


def test_names_are_the_same_whatever_the_tasks(tmp_path):
    save(tmp_path, [record(0), record(0, task="gsm8k")], model="/x/a/tiny")
    save(tmp_path, [record(0)], model="/x/b/tiny")
    assert study_tables.read([tmp_path])["model"].unique().tolist() == ["a/tiny", "b/tiny"]
    assert study_tables.read([tmp_path], ["gsm8k"])["model"].unique().tolist() == ["a/tiny"]


@pytest.mark.parametrize("name", ["/elsewhere/b/tiny", "b/tiny/", "/home/b/tiny", "C:\\b\\tiny"])
def test_records_of_the_model_that_is_meant(tmp_path, name):
    """Regression: those of another model with the same last part of its name came along."""
    for model in ("/home/a/tiny", "/home/b/tiny", "org/other"):
        save(tmp_path, [record(0)], model=model)
    records = study_tables.read([tmp_path])
    assert selection.select_model(records, name)["model"].tolist() == ["b/tiny"]
    assert selection.select_model(records, "/moved/other")["model"].tolist() == ["other"]
    with pytest.raises(
        CouplingError, match="got tiny, which may be a/tiny or b/tiny; give more of its path"
    ):
        selection.select_model(records, "tiny")
    with pytest.raises(
        CouplingError, match="got records of a/tiny, b/tiny, other, none of c/tiny; give"
    ):
        selection.select_model(records, "c/tiny")


@pytest.mark.parametrize(
    ("models", "name", "meant"),
    [
        (["gpt2", "/models/org/gpt2"], "org/gpt2", "/models/org/gpt2"),
        (["gpt2", "me/gpt2"], "gpt2", "gpt2"),
        (["gpt2", "me/gpt2"], "/models/me/gpt2", "me/gpt2"),
        (["gpt2", "me/gpt2"], "you/gpt2", None),
    ],
)
def test_a_name_that_ends_anothers_is_not_taken_for_it(models, name, meant):
    records = pd.DataFrame({"model": models})
    if meant is None:
        with pytest.raises(CouplingError, match=f"none of {name}"):
            selection.select_model(records, name)
    else:
        assert selection.select_model(records, name)["model"].tolist() == [meant]


def test_what_was_not_measured_is_named(run):
    with pytest.raises(
        CouplingError, match="got task mmlu, which was not measured; choose among arc"
    ):
        study_tables.read([run], ["mmlu"])
    with pytest.raises(
        CouplingError, match=r"got rank 7, expected one that all records have \(10, 30\)"
    ):
        study_tables.choose_rank(study_tables.read([run]), 7)
    assert study_tables.choose_rank(study_tables.read([run])) == 10
