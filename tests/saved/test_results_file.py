"""Results are read whole or passed over with the reason, whatever is in them."""

import copy
import json

import pytest
from saved_runs import DATE, record, results, save, task_summary

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.results_file import read_results
from lm_eval_coupling.saved.saved_run import find_runs


def put(run, path, value):
    *way, last = path
    for name in way:
        run = run.setdefault(name, {})
    run[last] = value


MISSHAPEN = [
    (["results"], 0.5, "no results"),
    (["results", "arc"], 0.5, "results.arc = 0.5, expected a mapping"),
    (["results", "arc"], None, "results.arc = None, expected a mapping"),
    (["config"], 3, "config = 3, expected a mapping"),
    (["config", "coupling"], True, "config.coupling = True, expected a mapping"),
    (["config", "coupling", "run_id"], [], "config.coupling.run_id = .., expected a text"),
    (["config", "coupling", "settings"], "x", "config.coupling.settings = 'x', expected a mapping"),
    (["config", "coupling", "settings", "measures"], 3, "measures = 3, expected a list"),
    (["config", "coupling", "tasks"], ["arc"], "tasks = .'arc'., expected a mapping"),
    (["config", "coupling", "tasks", "arc"], 3, "tasks.arc = 3, expected a mapping"),
    (["config", "coupling", "tasks", "arc", "measured"], "ten", "measured = 'ten', expected a num"),
    (["config", "coupling", "tasks", "arc", "measures", "x"], {"0": {}}, "= '0', expected a rank"),
    (["config", "coupling", "tasks", "arc", "measures", "x"], {"10": 0.5}, "x.10 = 0.5, expected"),
    (["config", "coupling", "tasks", "arc", "measures", "x"], {"mean": 1}, "mean, stderr and n"),
    (["config", "coupling", "headline_rank"], "10", "headline_rank = '10', expected a number"),
    (["group_subtasks"], ["arc"], "group_subtasks = .'arc'., expected a mapping"),
    (["group_subtasks"], {"g": "arc"}, "group_subtasks.g = 'arc', expected a list"),
    (["group_subtasks"], {"g": [3]}, "group_subtasks.g.0. = 3, expected a text"),
    (["versions"], 1, "versions = 1, expected a mapping"),
    (["configs"], {"arc": "x"}, "configs.arc = 'x', expected a mapping"),
    (["configs"], {"arc": {"output_type": ["x"]}}, "output_type = .'x'., expected a text"),
    (["higher_is_better"], {"arc": True}, "higher_is_better.arc = True, expected a mapping"),
    (["model_name"], {}, "model_name = {}, expected a text"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISSHAPEN)
def test_what_is_not_as_a_run_wrote_it_is_named_and_passed_over(
    tmp_path, caplog, path, value, message
):
    """It ended every command for all runs of the folder, or its model vanished without a word."""
    save(tmp_path / "good", {"arc": task_summary()}, model="org/good")
    wrong = copy.deepcopy(results({"arc": task_summary()}, model="org/wrong"))
    put(wrong, path, value)
    file = tmp_path / f"results_{DATE}.json"
    file.write_text(json.dumps(wrong))
    assert load_runs(tmp_path)["model"].tolist() == ["org/good"]
    assert str(file) in caplog.text
    with pytest.raises(CouplingError, match=message):
        read_results(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no JSON"),
        (b"\xff\xfe", "it is no UTF-8 text"),
        (b'{"results": ', "it is no JSON"),
        (b'{"results": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "no readable results"),
        (b'{"results": {"a": ' + b'{"b":' * 500 + b"1" + b"}" * 500 + b"}}", "nested more than"),
        (b'{"results": {"a": {"acc": ' + b"1" * 5000 + b"}}}", "no readable results file"),
        (b"[1, 2]", "which has no results"),
        (b'"results"', "which has no results"),
        (b"null", "which has no results"),
    ],
)
def test_what_is_no_results_file_at_all(tmp_path, content, reason):
    (tmp_path / "results_x.json").write_bytes(content)
    with pytest.raises(CouplingError, match=reason):
        read_results(tmp_path / "results_x.json")
    assert len(find_runs(tmp_path).passed_over) == 1


def test_numbers_of_every_size(tmp_path):
    run = results({"arc": task_summary()})
    run["results"]["arc"] |= {"acc,none": 10**400, "f1,strict": 1e400, "x,none": True}
    run["config"]["coupling"]["tasks"]["arc"]["measures"]["line_shape_score"]["n"] = 1e400
    (tmp_path / f"results_{DATE}.json").write_text(json.dumps(run))
    (row,) = load_runs(tmp_path).to_dict("records")
    assert row["acc,none"] != row["acc,none"] and row["line_shape_score"] != row["line_shape_score"]


def test_names_without_utf_8(tmp_path):
    run = results({"a\ud800": task_summary()}, model="org/\udc80m")
    (tmp_path / f"results_{DATE}.json").write_text(json.dumps(run))
    (row,) = load_runs(tmp_path).to_dict("records")
    assert (row["task"], row["model"]) == ("a?", "org/?m")


def test_undefined_is_nan_at_any_rank(tmp_path):
    """A task of a model of one block, or of a rank that no Jacobian has, was a TypeError."""
    run = results({"arc": task_summary(), "gsm": task_summary()}, groups={"all": ["arc", "gsm"]})
    run = json.loads(json.dumps(run))  # with ranks as texts
    summaries = run["config"]["coupling"]["tasks"]
    for name, values in summaries["arc"]["measures"].items():
        undefined = {"mean": None, "stderr": None, "n": 0}
        for rank in values if name != "coupling" else ["30"]:
            values |= {rank: undefined} if "mean" not in values else undefined
    (tmp_path / f"results_{DATE}.json").write_text(json.dumps(run))
    rows = load_runs(tmp_path).set_index("task")
    assert rows.loc["arc", "coupling@30"] != rows.loc["arc", "coupling@30"]
    assert rows.loc["arc", "coupling_excess@30"] != rows.loc["arc", "coupling_excess@30"]
    assert rows.loc["arc", "coupling@10"] == pytest.approx(0.29)
    assert rows.loc["all", "coupling@30"] == rows.loc["gsm", "coupling@30"]
    assert rows.loc["all", "coupling_n@30"] == 10 and rows.loc["all", "coupling_n@10"] == 20


def test_a_measure_that_one_task_of_a_group_lacks(tmp_path):
    run = results({"arc": task_summary(), "gsm": task_summary()}, groups={"all": ["arc", "gsm"]})
    del run["config"]["coupling"]["tasks"]["arc"]["measures"]["expodistance"]
    (tmp_path / f"results_{DATE}.json").write_text(json.dumps(run))
    rows = load_runs(tmp_path).set_index("task")
    assert rows.loc["all", "expodistance_n"] == 10 and rows.loc["all", "line_shape_score_n"] == 20


def test_times_are_seconds_since_the_epoch(tmp_path):
    """Dates of names are local: a clock that was put back, or another zone, changed what counts."""
    for date, seconds, mean in (
        ("2025-10-26T02-30-00", 1e9, 0.1),
        ("2025-10-26T02-10-00", 2e9, 0.2),
    ):
        save(tmp_path, {"arc": task_summary(mean)}, date=date, rows=[record(seed=int(mean * 10))])
        file = tmp_path / "org__tiny" / f"results_{date}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"date": seconds}))
    (row,) = load_runs(tmp_path).to_dict("records")
    assert row["time"] == 2e9 and row["coupling@10"] == pytest.approx(0.19)
    assert set(load_records(tmp_path)["date"]) == {"2025-10-26T02-10-00"}


def test_circles_and_lattices_of_groups(tmp_path):
    """A lattice of 29 levels has half a billion ways from its top to its bottom."""
    levels = 29
    groups = {
        f"g{level}{side}": [f"g{level + 1}a", f"g{level + 1}b"]
        for level in range(levels)
        for side in "ab"
    }
    groups |= {f"g{levels}{side}": ["arc", "g0a"] for side in "ab"}
    save(tmp_path, {"arc": task_summary()}, groups=groups)
    rows = load_runs(tmp_path).set_index("task")
    assert rows.loc["g0a", "coupling@10"] == rows.loc["arc", "coupling@10"]
    assert len(rows.loc["arc", "groups"]) == len(groups)
