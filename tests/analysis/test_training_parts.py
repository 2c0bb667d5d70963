"""Parts of coupling along trainings: rows, a stop in the middle, and numbers by hand."""

import json

import pandas as pd
import pytest
from scipy import stats
from studied import load_script

from lm_eval_coupling.errors import CouplingError

TINY = "--layers 2 --width 16 --heads 2 --mlp 24 --context 12 --vocabulary 280 --windows 4".split()
TINY += "--steps 0 2 4 6 --rank 3 --prompts 2 --seeds 2 --rate 0.01".split()


@pytest.fixture(scope="module")
def script():
    return load_script("training_parts")


@pytest.fixture(scope="module")
def out(script, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "sky"
    script.main([str(text), "--out", str(out), *TINY])
    return out


def test_every_step_of_every_seed_is_measured(out):
    rows = pd.read_json(out / "prompts.jsonl", lines=True)
    assert rows.groupby(["seed", "step"]).size().tolist() == [2] * 8
    assert rows.groupby("seed")["loss"].nunique().tolist() == [4, 4]
    parts = pd.read_csv(out / "parts.csv").set_index(["reading", "seed", "step"]).sort_index()
    of = rows.query("seed == 1 and step == 4")["rotated"]
    assert parts.loc[("rotated", 1, 4), "mean"] == pytest.approx(of.mean())
    assert parts.loc["loss", "chance"].isna().all()
    assert (parts.loc["coupling", "chance"] > 0).all()
    assert (out / "parts.png").stat().st_size > 1000


def test_correlations_with_less_loss_leave_out_the_untrained_model(out):
    rows = pd.read_json(out / "prompts.jsonl", lines=True)
    means = rows.query("seed == 0 and step > 0").groupby("step")[["loss", "coupling"]].mean()
    expected = stats.spearmanr(means["coupling"], -means["loss"]).statistic
    table = pd.read_csv(out / "spearman.csv").set_index(["seed", "reading"])
    assert table.loc[(0, "coupling"), "spearman"] == pytest.approx(expected, abs=1e-6)
    assert (table["steps"] == 3).all()
    assert table.loc[(0, "coupling"), "highest"] == pytest.approx(means["coupling"].max(), abs=1e-6)


def test_a_stopped_command_goes_on_and_gives_the_same(script, text, out, tmp_path):
    """A stop in the middle of writing leaves some rows of the second seed."""
    lines = (out / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "recipe.json").write_text((out / "recipe.json").read_text())
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:-2]) + lines[-2][:30])
    script.main([str(text), "--out", str(tmp_path), *TINY])
    again = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again[-8:]] == [json.loads(line) for line in lines[-8:]]
    assert (tmp_path / "parts.csv").read_text() == (out / "parts.csv").read_text()


def test_other_settings_are_refused(script, text, out, capsys):
    with pytest.raises(CouplingError, match="rows of other data or settings"):
        script.main([str(text), "--out", str(out), *TINY, "--rate", "0.02"])
    with pytest.raises(SystemExit):
        script.main([str(text), "--out", str(out), "--steps", "0"])
    assert "expected none below 0 and a last one of 1 or more" in capsys.readouterr().err
