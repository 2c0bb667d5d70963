"""Tables come back exactly as written; runs are joined and never mixed silently."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from saved_runs import CHANCE, DATE, coupling_config, record, results, save, task_summary

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.headline import coupling_of
from lm_eval_coupling.saved import arrow_columns
from lm_eval_coupling.saved.arrow_columns import arrow_type
from lm_eval_coupling.saved.records import find_tables, load_records
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.saved.tables import read_header, table_columns, write_tables
from lm_eval_coupling.saved.task_rows import pool

TYPES = {name: arrow_type(column) for name, column in table_columns().items()}


def same(a, b):
    if isinstance(b, np.ndarray):
        return (
            a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()
        )
    if isinstance(b, float) and math.isnan(b):
        return isinstance(a, float) and math.isnan(a)
    return a == b and (a is None) == (b is None)


def test_every_column_round_trips(tmp_path):
    rows = [record(doc_id=i, over_tokens=True) for i in range(3)] + [
        record(doc_id=3, reason="out of memory")
    ]
    rows[0]["normalized_miscoupling"][0, 0, 1] = np.nan
    rows[0]["expodistance"] = np.nan
    rows[1]["text"] = "naïve 🧪 \x00 \u202e 日本語 \r\n\t"
    rows[1]["norms"] = None
    rows[2] = record(doc_id=2, layers=7, ranks=(3,), over_tokens=True)
    (path,) = write_tables(rows, tmp_path, DATE, coupling_config({}))
    frame = load_records(path, columns=list(TYPES))
    of_the_table = {"model", "coupling"}  # made as it is written
    assert len(frame) == 4 and list(frame.columns)[: len(TYPES) - 1] == [
        name for name in TYPES if name != "model"
    ]
    assert set(TYPES) - of_the_table == set(rows[0])
    for i, row in enumerate(rows):
        for name, expected in row.items():
            assert same(frame[name].iloc[i], expected), (name, i, frame[name].iloc[i], expected)
    assert (
        set(frame["model"]) == {"org/tiny"}
        and set(frame["date"]) == {DATE}
        and set(frame["fingerprint"]) == {"f" * 64}
    )
    assert frame["doc_id"].dtype == np.int64 and frame["seconds"].dtype == np.float64


def test_columns_that_no_run_was_asked_for_are_left_out(tmp_path):
    """Ninety columns came back, of which thirty were empty."""
    rows = [record(doc_id=0), record(doc_id=1, reason="too short")]
    for row in rows:
        row["expodistance"] = np.nan  # asked for, and undefined in all of them
    write_tables(rows, tmp_path, DATE, {})
    frame = load_records(tmp_path)
    empty = {name for name in frame if frame[name].isna().all()}
    assert "expodistance" in empty and "reason" in frame and "singular_values" in frame
    assert not {"mlp_coupling", "trajectories", "self_miscoupling"} & {*frame}
    assert "trajectories" in load_records(tmp_path, columns=["trajectories"])


def test_missing_is_null_and_undefined_is_nan(tmp_path):
    rows = [record(doc_id=0), record(doc_id=1, reason="too short")]
    rows[0]["line_shape_score"] = np.nan
    table = pq.read_table(write_tables(rows, tmp_path, DATE, {})[0])
    assert table["reason"].to_pylist() == [None, "too short"]
    assert table["norms"].null_count == 1 and table["line_shape_score"].null_count == 0
    assert table.schema.field("subspace_overlap").type == TYPES["subspace_overlap"]


def test_nothing_measured_keeps_the_types(tmp_path):
    (path,) = write_tables([record(reason="out of memory")], tmp_path, DATE, {})
    assert {f.name: f.type for f in pq.read_schema(path)} == TYPES


def test_further_columns_are_kept(tmp_path):
    rows = [
        record() | {"context_coupling": np.ones((2, 3), np.float32), "note": "x"},
        record(doc_id=1),
    ]
    frame = load_records(write_tables(rows, tmp_path, DATE, {})[0])
    assert same(frame["context_coupling"].iloc[0], np.ones((2, 3), np.float32))
    assert list(frame["note"]) == ["x", None]


def test_a_lone_surrogate_does_not_stop_the_table(tmp_path):
    frame = load_records(write_tables([record() | {"text": "a\ud800b"}], tmp_path, DATE, {})[0])
    assert frame["text"].iloc[0] == "a?b"


@pytest.mark.parametrize(
    "task", ["arc_easy", "a/b", "a_b", "../../etc", "日本語", "x" * 300, "a:b?*", "mmlu-pro.1+2"]
)
def test_task_names_become_file_names(tmp_path, task):
    (path,) = write_tables([record(task)], tmp_path / "out", DATE, {})
    assert (
        path.parent == tmp_path / "out"
        and len(path.name.encode()) < 200
        and path.name.startswith("coupling_")
    )
    assert list(load_records(tmp_path)["task"]) == [task]


def test_names_that_look_alike_stay_apart(tmp_path):
    paths = write_tables([record("a/b"), record("a_b"), record("a:b")], tmp_path, DATE, {})
    assert len(set(paths)) == 3 and paths[1].name == f"coupling_a_b_{DATE}.parquet"
    assert set(load_records(tmp_path)["task"]) == {"a/b", "a_b", "a:b"}


def test_writing_is_atomic(tmp_path, monkeypatch):
    (path,) = write_tables([record()], tmp_path, DATE, {})
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CouplingError, match="cannot be written .no space left"):
        write_tables([record(doc_id=9)], tmp_path, DATE, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_compressed_with_provenance(tmp_path):
    (path,) = write_tables([record()], tmp_path, DATE, coupling_config({}))
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"
    about = read_header(path)[0]
    assert (
        about["task"] == "arc"
        and about["date"] == DATE
        and about["schema_version"] == 1
        and about["d_model"] == 64
    )


def test_a_table_has_the_summary_of_its_own_task_only(tmp_path):
    """Each of a group's 67 files held the summaries of all 67: 20 MB of tiny models."""
    summaries = {"arc": {"measured": 1}, "gsm": {"measured": 2}}
    provenance = {"model": "a", "tasks": summaries, "untrained": {"seed": 0, "tasks": summaries}}
    arc, gsm = write_tables([record("arc"), record("gsm")], tmp_path, DATE, provenance)
    assert read_header(arc)[0]["tasks"] == {"arc": {"measured": 1}}
    assert read_header(gsm)[0]["untrained"] == {"seed": 0, "tasks": {"gsm": {"measured": 2}}}
    assert provenance["tasks"] is summaries and len(summaries) == 2


def test_newest_table_per_folder_and_task(tmp_path):
    for date, seed in (("2025-06-02T00-00-00", 2), ("2025-06-01T00-00-00.5", 1)):
        for model in ("a", "b"):
            for task in ("arc", "gsm"):
                write_tables([record(task, seed=seed)], tmp_path / model, date, {"model": model})
    frame = load_records(tmp_path)
    assert (
        len(frame) == 4
        and set(frame["date"]) == {"2025-06-02T00-00-00"}
        and set(frame["model"]) == {"a", "b"}
    )
    assert len(load_records(tmp_path, newest=False)) == 8
    assert len(find_tables(tmp_path / "a")) == 2


def test_wrong_places_and_files_are_refused(tmp_path):
    with pytest.raises(CouplingError, match="does not exist"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(CouplingError, match=r"no coupling_\*.parquet; give"):
        load_records(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "coupling_other.parquet")
    with pytest.raises(CouplingError, match="not a coupling table"):
        load_records(tmp_path)
    (tmp_path / "coupling_other.parquet").write_text("rubbish")
    with pytest.raises(CouplingError, match="not a coupling table"):
        load_records(tmp_path / "coupling_other.parquet")


def test_another_schema_version_is_refused(tmp_path):
    (path,) = write_tables([record()], tmp_path, DATE, {})
    about = read_header(path)[0] | {"schema_version": 2}
    pq.write_table(
        pq.read_table(path).replace_schema_metadata({b"lm_eval_coupling": json.dumps(about)}), path
    )
    with pytest.raises(CouplingError, match="schema version 2, expected version 1"):
        load_records(path)


def test_runs_join_scores_and_coupling(tmp_path):
    save(tmp_path, {"arc": task_summary(0.3), "gsm": task_summary(0.4, failed=2)})
    runs = load_runs(tmp_path).set_index("task")
    arc = runs.loc["arc"]
    assert arc["model"] == "org/tiny" and arc["revision"] == "main" and arc["dtype"] == "bfloat16"
    assert arc["acc,none"] == 0.5 and arc["acc_stderr,none"] == 0.02 and arc["f1,strict"] == 0.4
    assert math.isnan(arc["f1_stderr,strict"])
    assert arc["n_fewshot"] == 5 and arc["n_samples"] == 50 and arc["measured"] == 10
    assert (arc["n_params"], arc["n_layers"], arc["d_model"]) == (1e6, 4, 64) and arc[
        "fingerprint"
    ] == "f" * 64
    assert arc["coupling@10"] == pytest.approx(0.29) and arc["coupling_stderr@10"] == pytest.approx(
        0.01
    )
    assert (
        arc["miscoupling_to@30"] == pytest.approx(0.27)
        and arc["line_shape_score"] == 2
        and arc["coupling_rank"] == 10
    )
    assert arc["coupling_excess@10"] == pytest.approx(0.29 - (1 - CHANCE[10]), abs=1e-4)
    assert runs.loc["gsm", "failed"] == 2 and not arc["is_group"]


def test_groups_pool_their_documents(tmp_path):
    groups = {"all": ["half", "gsm"], "half": ["arc", "mmlu"]}
    tasks = {
        "arc": task_summary(0.3, n=10),
        "gsm": task_summary(0.5, n=30),
        "mmlu": task_summary(0.2, n=1),
    }
    save(tmp_path, tasks, groups=groups)
    runs = load_runs(tmp_path).set_index("task")
    assert list(runs[runs["is_group"]].index) == ["all", "half"]
    assert runs.loc["all", "measured"] == 41
    assert runs.loc["all", "coupling@10"] == pytest.approx((0.29 * 10 + 0.49 * 30 + 0.19) / 41)


def test_pooling_is_exact():
    samples = [np.random.default_rng(i).random(n) for i, n in enumerate((7, 1, 30))]
    parts = [
        {
            "mean": s.mean(),
            "stderr": s.std(ddof=1) / len(s) ** 0.5 if len(s) > 1 else math.nan,
            "n": len(s),
        }
        for s in samples
    ]
    together = np.concatenate(samples)
    pooled = pool([*parts, {"mean": math.nan, "stderr": math.nan, "n": 0}])
    assert pooled["n"] == 38 and pooled["mean"] == pytest.approx(together.mean())
    assert pooled["stderr"] == pytest.approx(together.std(ddof=1) / 38**0.5)
    assert math.isnan(pool([])["mean"])


def test_newest_run_counts_and_coupling_is_not_lost(tmp_path):
    save(tmp_path, {"arc": task_summary(0.1)}, date="2025-06-01T00-00-00")
    save(tmp_path, {"arc": task_summary(0.3)}, date="2025-06-02T00-00-00")
    save(
        tmp_path,
        {"arc": task_summary(), "gsm": task_summary()},
        date="2025-06-03T00-00-00",
        coupling=False,
    )
    runs = load_runs(tmp_path).set_index("task")
    assert runs.loc["arc", "coupling@10"] == pytest.approx(0.29)
    assert math.isnan(runs.loc["gsm", "coupling@10"]) and runs.loc["gsm", "acc,none"] == 0.5


def trial(folder, day, *, scored, measured, **settings):
    """Save a run of this day of June with tables of so many documents."""
    date, summary = f"2025-06-0{day}T00-00-00", task_summary(day / 10, n=measured)
    config = coupling_config({"arc": summary})["settings"] | settings
    rows = [record("arc", i) for i in range(measured)]
    where = save(folder, {"arc": summary}, date=date, rows=rows, settings=config)
    file = where / f"results_{date}.json"
    run = json.loads(file.read_text()) | {
        "n-samples": {"arc": {"original": 100, "effective": scored}}
    }
    file.write_text(json.dumps(run))


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        (dict(scored=50, measured=7), dict(scored=2, measured=2), 1),
        (dict(scored=50, measured=7), dict(scored=50, measured=2), 1),  # interrupted
        (dict(scored=50, measured=7), dict(scored=20, measured=7), 1),
        (dict(scored=50, measured=7), dict(scored=50, measured=7), 2),
        (
            dict(scored=50, measured=2),
            dict(scored=20, measured=7),
            2,
        ),  # coupling of 2 documents says nothing
        (dict(scored=50, measured=7), dict(scored=20, measured=2, depth_version=99), 2),
        (dict(scored=50, measured=7), dict(scored=20, measured=2, measures=["depth", "halves"]), 2),
    ],
)
def test_a_short_trial_takes_no_place(tmp_path, first, second, counts):
    """Scores of 2 documents stood for those of 50 because their run was the later one."""
    trial(tmp_path, 1, **first)
    trial(tmp_path, 2, **second)
    (row,) = load_runs(tmp_path).to_dict("records")
    documents = (first, second)[counts - 1]
    assert row["date"].startswith(f"2025-06-0{counts}") and row["n_samples"] == documents["scored"]
    if first["measured"] != second["measured"]:
        assert len(load_records(tmp_path)) == documents["measured"]
    assert len(load_runs(tmp_path, newest=False, mixed="keep")) == 2


def test_documents_of_a_group_are_those_of_its_tasks_where_lm_eval_does_not_say(tmp_path):
    run = results({"a": task_summary(), "b": task_summary()}, groups={"both": ["a", "b"]})
    del run["results"]["both"]["sample_len"]
    counts = {name: {"original": 90, "effective": n} for name, n in (("a", 30), ("b", 20))}
    (tmp_path / "results_2025-06-01T00-00-00.json").write_text(
        json.dumps(run | {"n-samples": counts})
    )
    assert load_runs(tmp_path).set_index("task")["n_samples"].to_dict() == {
        "a": 30,
        "b": 20,
        "both": 50,
    }


def test_revisions_are_models_of_their_own(tmp_path):
    for i, step in enumerate(("step1", "step1000")):
        run = results({"arc": task_summary(0.1 + i)})
        run["config"]["model_revision"] = run["config"]["coupling"]["revision"] = step
        (tmp_path / f"results_2025-06-0{i + 1}T00-00-00.json").write_text(json.dumps(run))
    assert list(load_runs(tmp_path)["revision"]) == ["step1", "step1000"]


def test_a_revision_that_was_asked_of_a_folder_is_none(tmp_path):
    """lm-eval records the revision that was asked for, which a folder does not have."""
    run = results({"arc": task_summary()})
    run["config"]["model_revision"], run["config"]["coupling"]["revision"] = "step1", "main"
    (tmp_path / "results_2025-06-01T00-00-00.json").write_text(json.dumps(run))
    assert list(load_runs(tmp_path)["revision"]) == ["main"]


@pytest.mark.parametrize(("key", "value"), [("position", 0), ("seed", 1), ("ranks", [10, 30, 50])])
def test_different_settings_are_not_mixed(tmp_path, key, value):
    settings = coupling_config({})["settings"]
    save(tmp_path, {"arc": task_summary()}, model="a")
    save(tmp_path, {"arc": task_summary()}, model="b", settings=settings | {key: value})
    with pytest.raises(
        CouplingError, match=rf"{key} is .* in .*a.results.* but .* in .*b.results.*mixed='keep'"
    ) as error:
        load_runs(tmp_path)
    assert repr(settings[key]) in str(error.value) and repr(value) in str(error.value)
    assert len(load_runs(tmp_path, mixed="keep")) == 2
    with pytest.raises(CouplingError, match="mixed='yes', expected one of refuse, keep"):
        load_runs(tmp_path, mixed="yes")


@pytest.mark.parametrize(
    ("key", "value"), [("measures", ["depth"]), ("tokens", "all"), ("regularity_version", 2)]
)
def test_settings_that_do_not_touch_depth_are_no_reason_to_refuse(tmp_path, key, value):
    settings = coupling_config({})["settings"]
    save(tmp_path, {"arc": task_summary()}, model="a")
    save(tmp_path, {"arc": task_summary()}, model="b", settings=settings | {key: value})
    assert list(load_runs(tmp_path)["model"]) == ["a", "b"]


@pytest.mark.parametrize(("key", "value"), [("limit", 7), ("seed", 1)])
def test_which_documents_were_measured_must_agree_within_a_task_only(tmp_path, key, value):
    """A model's long task measured on fewer documents than its short one was refused."""
    settings = coupling_config({})["settings"]
    save(tmp_path, {"arc": task_summary()}, model="a")
    save(
        tmp_path,
        {"gsm": task_summary()},
        model="a",
        date="2025-06-02T00-00-00",
        settings=settings | {key: value},
    )
    assert list(load_runs(tmp_path)["task"]) == ["arc", "gsm"]
    save(tmp_path, {"gsm": task_summary()}, model="b", date="2025-06-03T00-00-00")
    with pytest.raises(CouplingError, match=f"{key} is "):
        load_runs(tmp_path)


def test_all_runs_on_request(tmp_path):
    for day, mean in ((1, 0.1), (2, 0.2)):
        save(tmp_path, {"arc": task_summary(mean)}, date=f"2025-06-0{day}T00-00-00")
    assert list(load_runs(tmp_path)["coupling@10"]) == pytest.approx([0.19])
    every = load_runs(tmp_path, newest=False)
    assert list(every["date"]) == ["2025-06-01T00-00-00", "2025-06-02T00-00-00"]
    assert list(every["coupling@10"]) == pytest.approx([0.09, 0.19])
    assert (
        len(load_runs([tmp_path, tmp_path / "org__tiny", *tmp_path.rglob("*.json")], newest=False))
        == 2
    )


def test_what_makes_scores_comparable_is_kept(tmp_path):
    where = save(
        tmp_path,
        {"arc": task_summary(), "gsm": task_summary()},
        groups={"all": ["arc", "gsm"]},
        n_heads=8,
    )
    (file,) = where.glob("results*.json")
    run = json.loads(file.read_text())
    run |= {"versions": {"arc": 1.0}, "lm_eval_version": "0.4.13", "chat_template": "{{x}}"}
    run["config"]["coupling"]["interrupted"] = True
    file.write_text(json.dumps(run))
    runs = load_runs(tmp_path).set_index("task")
    arc = runs.loc["arc"]
    assert (arc["task_version"], arc["lm_eval_version"], arc["n_samples"], arc["n_total"]) == (
        1,
        "0.4.13",
        50,
        100,
    )
    assert (
        arc["chat_template"]
        and arc["interrupted"]
        and arc["run_id"] == "abc"
        and arc["n_heads"] == 8
    )
    assert arc["metric"] == "acc,none" and arc["group"] == "all" and runs.loc["all", "group"] == ""
    assert arc["family"] == "tiny" and not arc["tuned"] and math.isnan(arc["step"])


def test_facts_are_joined(tmp_path):
    save(tmp_path, {"arc": task_summary()})
    (tmp_path / "facts.csv").write_text("model,family,training_tokens\ntiny,greek,5e9\n")
    runs = load_runs(tmp_path, facts=tmp_path / "facts.csv")
    assert list(runs["family"]) == ["greek"] and list(runs["training_tokens"]) == [5e9]


def test_only_some_columns_of_the_records(tmp_path):
    write_tables([record(), record(doc_id=1)], tmp_path, DATE, {"model": "a"})
    frame = load_records(tmp_path, columns=["norms", "doc_hash", "not there"])
    of_the_run = {
        "weights",
        "model",
        "revision",
        "variant",
        "fingerprint",
        "prompting",
        "date",
        "untrained_seed",
    }
    assert set(frame) == {"norms", "doc_hash"} | of_the_run and len(frame) == 2
    assert np.array_equal(frame["norms"][0], record()["norms"])


def test_coupling_of_a_saved_matrix():
    matrix = np.array([[0, 0.5, np.nan], [0.7, 0, 0.6], [0.8, 0.4, 0]], np.float32)
    assert coupling_of(matrix) == pytest.approx(1 - (0.5 + 0.7 + 0.6 + 0.8 + 0.4) / 5)
    assert math.isnan(coupling_of(np.eye(1, dtype=np.float32)))


def test_older_result_files_load(tmp_path):
    old = {
        "results": {"arc": {"acc": 0.4, "acc_stderr": 0.01}},
        "config": {"model": "hf", "model_args": "pretrained=org/old"},
    }
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "results.json").write_text(json.dumps(old))
    (tmp_path / "y" / "bare").mkdir(parents=True)
    (tmp_path / "y" / "bare" / "out_2025-06-01T00-00-00.1.json").write_text(
        json.dumps({"results": {"arc": {"acc,none": 0.6}}})
    )
    (tmp_path / "results_of_mine.json").write_text("[1]")
    runs = load_runs(tmp_path).set_index("model")
    assert runs.loc["org/old", "acc,none"] == 0.4 and runs.loc["bare", "acc,none"] == 0.6
    assert runs.loc["bare", "measured"] == 0 and runs.loc["bare", "date"] == "2025-06-01T00-00-00.1"


def test_unreadable_results_are_named(tmp_path):
    with pytest.raises(CouplingError, match="no results_"):
        load_runs(tmp_path)
    with pytest.raises(CouplingError, match="does not exist"):
        load_runs([tmp_path / "nowhere"])
    (tmp_path / "results_x.json").write_text('{"results": {"arc"')
    with pytest.raises(CouplingError, match="results_x.json, which is no readable results file"):
        load_runs(tmp_path)
    (tmp_path / "results_x.json").write_text("{}")
    with pytest.raises(CouplingError, match="has no results"):
        load_runs(tmp_path / "results_x.json")


def test_many_runs_are_one_table(tmp_path):
    tasks = {f"task{i}": task_summary() for i in range(6)}
    text = json.dumps(results(tasks))
    for i in range(50):
        (tmp_path / f"model{i}").mkdir()
        (tmp_path / f"model{i}" / f"results_{DATE}.json").write_text(
            text.replace("org/tiny", f"org/{i}")
        )
    runs = load_runs(tmp_path)
    assert len(runs) == 300 and set(runs["model"]) == {f"org/{i}" for i in range(50)}


def test_nothing_heavy_is_imported():
    code = "import sys, lm_eval_coupling.saved.tables; "
    code += "sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_untrained_twin_is_read_only_where_it_is_wanted(tmp_path):
    write_tables(
        [record(), record(doc_id=1) | {"weights": "untrained"}], tmp_path, DATE, {"model": "a"}
    )
    assert list(load_records(tmp_path)["doc_id"]) == [0]
    assert list(load_records(tmp_path, weights="untrained", columns=["doc_id"])["doc_id"]) == [1]
    assert list(load_records(tmp_path, weights="all")["weights"]) == ["trained", "untrained"]
    with pytest.raises(CouplingError, match="got weights='fresh', expected one of trained"):
        load_records(tmp_path, weights="fresh")


def test_untrained_rows_have_a_file_of_their_own(tmp_path):
    """Plain pandas averaged over trained and untrained weights of one file."""
    rows = [record(), record() | {"weights": "untrained"}, record("untrained_arc")]
    files = write_tables(rows, tmp_path, DATE, {"model": "org/a", "run_id": "r"})
    assert [file.name for file in files[:2]] == [
        f"coupling_arc_{DATE}.parquet",
        f"untrained_coupling_arc_{DATE}.parquet",
    ]
    assert len(set(files)) == 3  # a task may be called so, too
    assert {*tmp_path.glob("coupling_*.parquet")} == {files[0], files[2]}
    for file, weights in zip(files, ("trained", "untrained", "trained"), strict=True):
        plain = pd.read_parquet(file)
        assert set(plain["weights"]) == {weights} and set(plain["model"]) == {"org/a"}
    assert [
        len(load_records(tmp_path, weights=weights)) for weights in ("trained", "untrained", "all")
    ] == [2, 1, 3]
    assert list(load_records(files[1], weights="all")["weights"]) == ["untrained"]
    assert len(load_records(files[0])) == 1 and load_records(files[1]).empty


def test_a_field_says_what_it_is(tmp_path):
    (file,) = write_tables([record()], tmp_path, DATE, {})
    field = pq.read_schema(file).field("normalized_miscoupling")
    assert (
        field.metadata[b"shape"] == b"[rank, layer, layer]"
        and "‖A − Diag A‖_F" in field.metadata[b"description"].decode()
    )


def test_offsets_of_a_large_table_do_not_wrap(tmp_path, monkeypatch):
    """A nested column of more numbers than 32-bit offsets hold came back as other numbers."""
    rows = [record(doc_id=i) for i in range(7)] + [record(doc_id=7, reason="too short")]
    size = rows[0]["subspace_overlap"].size
    monkeypatch.setattr(arrow_columns, "_MOST", 2 * size + 1)
    frame = load_records(write_tables(rows, tmp_path, DATE, {})[0])
    for i, row in enumerate(rows):
        assert same(frame["subspace_overlap"].iloc[i], row["subspace_overlap"])
    monkeypatch.setattr(arrow_columns, "_MOST", size - 1)
    with pytest.raises(CouplingError, match="numbers in one cell of a table"):
        write_tables(rows, tmp_path / "other", DATE, {})
