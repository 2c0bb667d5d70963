"""A few models beside each other: means over documents, scores, tasks in the same order."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import saved_runs
from studied import record, script

from lm_eval_coupling.errors import CouplingError

pytestmark = pytest.mark.usefixtures("elsewhere")
MODELS = {
    "org/a": (0.1, 0.3),
    "org/b": (0.2, 0.5),
    "org/c": (0.3, 0.4),
}  # shift of m̃ of all pairs, accuracy


@pytest.fixture
def runs(tmp_path):
    for model, (shift, accuracy) in MODELS.items():
        rows = [
            record(i, task=task, shift=shift + i / 100)
            for task in ("arc", "piqa")
            for i in range(3)
        ]
        rows += [record(i, weights="untrained", shift=0.5) for i in range(3)]
        summaries = {task: saved_runs.task_summary(n=3) for task in ("arc", "piqa")}
        where = saved_runs.save(tmp_path, summaries, model=model, rows=rows, fingerprint=model)
        (file,) = where.glob("results_*.json")
        actual = json.loads(file.read_text())
        actual["results"]["arc"]["acc,none"] = accuracy
        actual["results"]["piqa"]["acc,none"] = 1 - accuracy
        file.write_text(json.dumps(actual))
    return tmp_path


def test_means_scores_and_what_goes_the_same_way(runs, tmp_path, capsys):
    script("real_models")([str(runs), "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "models.csv").set_index(
        ["model", "weights", "task", "measure"]
    )
    each = [_coupling(record(i, shift=0.2 + i / 100)) for i in range(3)]
    actual = rows.loc[("b", "trained", "arc", "coupling")]
    assert actual["mean"] == pytest.approx(np.mean(each), abs=1e-6) and actual["n"] == 3
    assert actual["stderr"] == pytest.approx(np.std(each, ddof=1) / 3**0.5, abs=1e-6)
    assert (
        rows.loc[("b", "trained", "all", "coupling")]["n"] == 6
        and rows.loc[("b", "untrained", "arc", "coupling")]["n"] == 3
    )
    assert rows.loc[("b", "trained", "piqa", "acc,none")]["mean"] == pytest.approx(0.5)
    output = capsys.readouterr().out
    (line,) = [
        line.split()
        for line in output.splitlines()
        if line.split()[:1] == ["coupling"] and len(line.split()) == 4
    ]
    # Coupling falls from a to c; accuracy ends higher in arc (0.3, 0.5, 0.4) and lower in piqa.
    assert line == ["coupling", "3", "1", "2"]
    assert (tmp_path / "out" / "models.png").exists()


def test_what_is_committed_gives_the_same_again(runs, tmp_path):
    """documents.csv stands for the tables, which are too large to be kept."""
    kept, again = tmp_path / "kept", tmp_path / "again"
    script("real_models")([str(runs), "--out", str(kept)])
    for file in list(runs.glob("org__*/results_*.json")):
        (kept / "runs" / file.parent.name).mkdir(parents=True)
        shutil.copy(file, kept / "runs" / file.parent.name)
    assert not list(kept.rglob("*.parquet"))
    script("real_models")([str(kept), "--out", str(again), "--tasks", "arc"])
    with pytest.raises(CouplingError, match="got task typo, expected some of arc, piqa"):
        script("real_models")([str(kept), "--out", str(again), "--tasks", "typo"])
    with pytest.raises(CouplingError, match="expected one K = 30"):
        script("real_models")([str(kept), "--out", str(again), "--rank", "30"])
    assert len(pd.read_csv(again / "documents.csv")) == len(
        pd.read_csv(kept / "documents.csv")
    )  # whatever was asked
    full, actual = (
        pd.read_csv(folder / "models.csv").query("task == 'arc'") for folder in (kept, again)
    )
    pd.testing.assert_frame_equal(
        full.reset_index(drop=True), actual.reset_index(drop=True), atol=2e-6
    )


def test_tasks_of_a_group_count_as_one(tmp_path):
    summaries = {"blimp_a": saved_runs.task_summary(n=2), "blimp_b": saved_runs.task_summary(n=2)}
    rows = [record(i, task=task, shift=i / 10) for task in summaries for i in range(2)]
    where = saved_runs.save(tmp_path, summaries, rows=rows)
    (file,) = where.glob("results_*.json")
    actual = json.loads(file.read_text())
    actual["results"]["blimp"] = {"alias": "blimp", "acc,none": 0.7}
    actual["group_subtasks"] = {"blimp": ["blimp_a", "blimp_b"]}
    file.write_text(json.dumps(actual))
    script("real_models")([str(tmp_path), "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "models.csv").set_index(["task", "measure"])
    assert set(rows.index.get_level_values("task")) == {"blimp", "all"}
    assert (
        rows.loc[("blimp", "acc,none"), "mean"] == 0.7 and rows.loc[("blimp", "coupling"), "n"] == 4
    )


def _coupling(row):
    pairs = row["normalized_miscoupling"][list(row["ranks"]).index(10)].astype(float)
    return 1 - pairs[~np.eye(len(pairs), dtype=bool)].mean()
