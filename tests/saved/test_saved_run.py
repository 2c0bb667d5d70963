"""A run is its results, tables and samples; other weights or prompts are never one run."""

import json

import numpy as np
import pytest
from saved_runs import DATE, SETTINGS, record, save, task_summary

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.headline import couplings_of
from lm_eval_coupling.saved.names import label_rows
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.tables import SCHEMA_VERSION
from lm_eval_coupling.saved.values import prompt_values, value_names

DAYS = [f"2025-06-0{day}T00-00-00" for day in range(1, 5)]


def change(where, date, **changes):
    """Change what lm-eval wrote in its results."""
    file = where / f"results_{date}.json"
    run = json.loads(file.read_text())
    arguments = changes.pop("model_args", None)
    if arguments:
        run["config"]["model_args"] = arguments
    file.write_text(json.dumps(run | changes))


def two_runs(folder, first, second, same_weights=True, **more):
    """Save one model and task twice, with other things that lm-eval wrote."""
    for number, (date, changes) in enumerate(zip(DAYS, (first, second), strict=False)):
        print_ = ("a" if same_weights else "ab"[number]) * 64
        rows = [record(seed=number) | {"prompt_hash": f"p{number}"}]
        where = save(
            folder,
            {"arc": task_summary(0.1 * number)},
            rows=rows,
            date=date,
            run_id=date,
            fingerprint=print_,
            **more,
        )
        change(where, date, **changes)


PROMPTS = {
    "shots": ({"n-shot": {"arc": 2}}, {"n-shot": {"arc": 5}}),
    "chat template": (
        {"chat_template": None},
        {"chat_template": "{{x}}", "chat_template_sha": "1f2e3d4c5b"},
    ),
    "system instruction": ({}, {"system_instruction": "Be brief."}),
    "turns": tuple(
        {"chat_template": "x", "fewshot_as_multiturn": turns} for turns in (True, False)
    ),
    "description": tuple(
        {"configs": {"arc": {"description": text}}} for text in ("", "Questions on birds.")
    ),
    "answers": tuple(
        {"configs": {"arc": {"doc_to_target": text}}} for text in ("gold", "{{answer}}")
    ),
    "answers of examples": tuple(
        {"configs": {"arc": {"fewshot_config": {"sampler": "default", "doc_to_target": text}}}}
        for text in ("gold", "key")
    ),
    "samples": (
        {},
        {
            "n-samples": {"arc": {"original": 100, "effective": 2}},
            "config": None,
            "task_hashes": {"arc": "77"},
        },
    ),
}


@pytest.mark.parametrize("what", PROMPTS)
def test_what_makes_the_prompts_keeps_runs_apart(tmp_path, what):
    """Runs with 2 and with 5 examples were one row, the newer, and one pool of records."""
    first, second = (dict(changes) for changes in PROMPTS[what])
    if "config" in second:
        second.pop("config")
    two_runs(tmp_path, first, second)
    if what == "samples":
        for date in DAYS[:2]:
            file = tmp_path / "org__tiny" / f"results_{date}.json"
            run = json.loads(file.read_text())
            run["config"]["limit"] = 50 if date == DAYS[0] else None
            file.write_text(json.dumps(run))
    runs = load_runs(tmp_path)
    assert len(runs) == 2 and runs["prompting"].nunique() == 2 and label_rows(runs).nunique() == 2
    records = load_records(tmp_path)
    assert len(records) == 2 and records["prompting"].nunique() == 2


def test_how_many_documents_were_measured_makes_no_other_prompts(tmp_path):
    two_runs(tmp_path, {}, {"n-samples": {"arc": {"original": 100, "effective": 20}}})
    assert len(load_runs(tmp_path)) == len(load_records(tmp_path)) == 1


def test_where_a_function_lay_makes_no_other_prompts(tmp_path):
    """lm-eval writes the functions of nested settings as Python prints them."""
    printed = [{"doc_to_target": f"<function answer at 0x7f{number}1c>"} for number in range(2)]
    two_runs(tmp_path, *({"configs": {"arc": {"fewshot_config": item}}} for item in printed))
    assert len(load_runs(tmp_path)) == len(load_records(tmp_path)) == 1


def test_another_token_is_another_measurement(tmp_path):
    settings = SETTINGS | {"position": 0}
    save(tmp_path, {"arc": task_summary()}, rows=[record()], date=DAYS[0], run_id="a")
    save(
        tmp_path,
        {"arc": task_summary()},
        rows=[record(seed=1)],
        date=DAYS[1],
        run_id="b",
        settings=settings,
    )
    assert set(load_records(tmp_path)["prompting"]) == {"5-shot", "5-shot, token 0"}
    with pytest.raises(CouplingError, match="position is"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("add_bos_token", "True"), ("max_length", "512"), ("enable_thinking", "False")]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_how_texts_become_tokens_keeps_runs_apart(tmp_path, key, value, as_text):
    """Only the newer run was read, though one more first token makes other prompts."""
    plain, other = {"pretrained": "org/tiny"}, {"pretrained": "org/tiny", key: value}
    given = [
        ",".join(f"{k}={v}" for k, v in item.items()) if as_text else item
        for item in (plain, other)
    ]
    two_runs(tmp_path, *({"model_args": item} for item in given))
    runs = load_runs(tmp_path)
    assert sorted(label_rows(runs)) == ["tiny", f"tiny ({key}={value})"]
    assert load_records(tmp_path)["prompting"].nunique() == 2


def test_the_models_own_tokenizer_by_name_is_no_difference(tmp_path):
    given = (
        {"pretrained": "org/tiny"},
        {"pretrained": "org/tiny", "tokenizer": "org/tiny", "truncation": False},
    )
    two_runs(tmp_path, *({"model_args": item} for item in given))
    assert len(load_runs(tmp_path)) == 1


@pytest.mark.parametrize("key", ["subfolder", "gguf_file", "peft", "dtype"])
def test_two_weights_under_one_name_are_two(tmp_path, key):
    """Only the newer of two checkpoints in subfolders was read: a curve was a point."""
    arguments = [{"pretrained": "org/tiny", key: f"checkpoint-{step}"} for step in (10, 20)]
    two_runs(tmp_path, *({"model_args": given} for given in arguments), same_weights=False)
    runs, records = load_runs(tmp_path), load_records(tmp_path)
    assert len(runs) == len(records) == 2
    assert runs["fingerprint"].nunique() == 2 and sorted(label_rows(runs)) != ["tiny", "tiny"]
    assert len(set(label_rows(runs))) == 2
    if key == "subfolder":
        assert runs["step"].tolist() == [10, 20] and set(runs["lineage"]) == {"org/tiny"}


def test_a_subfolder_that_ends_the_models_name_is_one_all_the_same(tmp_path):
    """Of two checkpoints of ``org/run10`` one was lost, as 0 and 10 end that name."""
    for day, part in zip(DAYS, ("0", "10", "run10"), strict=False):
        where = save(tmp_path, {"arc": task_summary()}, date=day, model="org/run10", coupling=False)
        change(where, day, model_args={"pretrained": "org/run10", "subfolder": part})
    names = ["org/run10", "org/run10/0", "org/run10/10"]
    assert sorted(load_runs(tmp_path)["model"]) == names


def test_weights_that_changed_under_one_name_are_told_apart(tmp_path):
    two_runs(tmp_path, {}, {}, same_weights=False)
    assert set(label_rows(load_runs(tmp_path))) == {"tiny #aaaaaaaa", "tiny #bbbbbbbb"}
    assert load_records(tmp_path)["fingerprint"].nunique() == 2


def test_scores_without_coupling_are_of_the_weights_of_their_name(tmp_path):
    save(tmp_path, {"arc": task_summary()}, date=DAYS[0])
    save(tmp_path, {"arc": task_summary()}, date=DAYS[1], coupling=False)
    (row,) = load_runs(tmp_path).to_dict("records")
    assert row["date"] == DAYS[0] and row["measured"] == 10


def test_directions_are_those_of_lm_eval(tmp_path):
    """``higher_is_better`` was not read: a bias counted as better the larger it was."""
    where = save(tmp_path, {"arc": task_summary()})
    told = {
        "arc": {
            "likelihood_diff": False,
            "acc": True,
            "nested": {"mean": False, "max": False},
            "both": {"a": True, "b": False},
        }
    }
    change(where, DATE, higher_is_better=told)
    actual = dict(load_runs(tmp_path)["directions"][0])
    assert actual == {
        "likelihood_diff": False,
        "acc": True,
        "nested": False,
        "mean": False,
        "max": False,
        "a": True,
        "b": False,
    }


def test_chance_is_that_of_coupling(tmp_path):
    """Runs had 0.949 as ``chance@10``, that of miscoupling, and other tables 0.051."""
    save(tmp_path, {"arc": task_summary()})
    (row,) = load_runs(tmp_path).to_dict("records")
    assert row["chance@10"] == pytest.approx(0.05158017, abs=1e-8)
    assert row["coupling_excess@10"] == pytest.approx(row["coupling@10"] - row["chance@10"])


def test_a_table_finds_its_results_by_run_in_another_folder(tmp_path):
    where = save(tmp_path / "results", {"arc": task_summary()}, rows=[record()], run_id="here")
    change(where, DATE, **{"n-shot": {"arc": 3}})
    (tmp_path / "tables").mkdir()
    (table,) = where.glob("*.parquet")
    table.rename(tmp_path / "tables" / table.name)
    (run,) = find_runs([tmp_path / "results", tmp_path / "tables"]).runs
    assert run.table("arc").file.parent.name == "tables"
    assert set(load_records(tmp_path)["prompting"]) == {"3-shot"}
    assert set(load_records(tmp_path / "tables")["prompting"]) == {"unknown prompts"}


def test_values_are_those_of_the_matrices(tmp_path):
    rows = [record(doc_id=i) for i in range(150)] + [record(doc_id=200, reason="out of memory")]
    rows[3]["normalized_miscoupling"][:, 0, 1] = np.nan
    save(tmp_path, {"arc": task_summary()}, rows=rows)
    (table,) = find_runs(tmp_path).runs[0].tables
    actual = prompt_values(table)
    expected = [couplings_of(row["normalized_miscoupling"]) or [np.nan, np.nan] for row in rows]
    np.testing.assert_array_equal(actual[["coupling@10", "coupling@30"]], expected)
    assert actual["worst_certificate"][3] == max(rows[3]["certificate"]) and np.isnan(
        actual["worst_certificate"][150]
    )


def test_what_a_measure_keeps_for_every_rank_is_a_number_of_the_prompt(tmp_path):
    """Coupling of attention alone was a predictor of runs and none of documents."""
    rows = [record(doc_id=i) | {"attention_coupling": np.float32([i / 8, 0.25])} for i in range(3)]
    rows += [record(doc_id=3), record(doc_id=4, reason="out of memory")]
    save(tmp_path, {"arc": task_summary()}, rows=rows)
    (table,) = find_runs(tmp_path).runs[0].tables
    actual = prompt_values(table)
    np.testing.assert_array_equal(actual["attention_coupling@10"], [0, 0.125, 0.25, np.nan, np.nan])
    np.testing.assert_array_equal(
        actual["attention_coupling@30"], [0.25, 0.25, 0.25, np.nan, np.nan]
    )
    names = value_names(actual)
    assert names[:2] == ["coupling@10", "coupling@30"] and {
        "attention_coupling@10",
        "attention_coupling@30",
    } <= {*names}


def test_bad_files_are_named_and_passed_over(tmp_path, caplog):
    """An unreadable file was the end of every command that met it."""
    where = save(tmp_path, {"arc": task_summary()}, rows=[record()])
    (where / "results_broken.json").write_text('{"results": {"arc"')
    (where / "coupling_broken.parquet").write_bytes(b"PAR1")
    assert len(load_runs(tmp_path)) == len(load_records(tmp_path)) == 1
    assert "results_broken.json" in caplog.text and "coupling_broken.parquet" in caplog.text
    with pytest.raises(CouplingError, match="not a coupling table"):
        load_records(where / "coupling_broken.parquet")


def test_results_of_a_later_release_are_not_read_as_if_they_were_ours(tmp_path, caplog):
    """Tables were held to their version, the summaries beside lm-eval's scores were not."""
    where = save(tmp_path, {"arc": task_summary()}, rows=[record()])
    (file,) = where.glob("results_*.json")
    later = json.loads(file.read_text())
    later["config"]["coupling"]["schema_version"] = SCHEMA_VERSION + 1
    (where / "results_2030-01-01T00-00-00.000000.json").write_text(json.dumps(later))
    assert len(load_runs(tmp_path)) == 1
    assert (
        f"of schema version {SCHEMA_VERSION + 1}, expected version {SCHEMA_VERSION}" in caplog.text
    )
    with pytest.raises(CouplingError, match="read it with the release that wrote it"):
        load_runs(where / "results_2030-01-01T00-00-00.000000.json")


def test_one_path_typed_in_several_ways_is_one_model(tmp_path):
    """`models/tiny` and `models/tiny/` were two models of one training."""
    for day, name in zip(DAYS, ("/models/tiny", "/models/tiny/", "/models//tiny"), strict=False):
        save(tmp_path / day, {"arc": task_summary()}, model=name, date=day, run_id=day)
    assert load_runs(tmp_path).model.tolist() == ["/models/tiny"]
