"""The intervention: matched members, a stop in the middle, and differences by hand."""

import json

import pandas as pd
import pytest
from studied import load_script

from lm_eval_coupling.errors import CouplingError

TINY = "--layers 2 --width 16 --heads 2 --mlp 24 --context 12 --vocabulary 280 --windows 4".split()
TINY += "--steps 6 --rank 3 --prompts 2 --seeds 2 --strengths -2 2 --rate 0.01".split()


@pytest.fixture(scope="module")
def script():
    return load_script("intervention")


@pytest.fixture(scope="module")
def out(script, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "sky"
    script.main([str(text), "--out", str(out), *TINY])
    return out


def test_every_member_is_trained_and_compared_with_its_control(out):
    rows = pd.read_json(out / "members.jsonl", lines=True)
    assert len(rows) == 2 * (1 + 2 * 2) and rows.notna().all().all()
    effects = pd.read_csv(out / "effects.csv")
    assert set(effects["member"]) == {"rotated -2", "rotated +2", "raw -2", "raw +2"}
    assert (effects["seeds"] == 2).all() and (out / "effects.png").stat().st_size > 1000
    of = rows.set_index(["form", "strength", "seed"])["rotated"]
    by_hand = sum(of["rotated", 2.0, seed] - of["none", 0.0, seed] for seed in (0, 1)) / 2
    (row,) = effects.query("outcome == 'rotated' and member == 'rotated +2'").to_dict("records")
    assert row["difference"] == pytest.approx(by_hand, rel=1e-3)
    assert row["low"] < row["difference"] < row["high"]


def test_a_stopped_command_goes_on_and_gives_the_same(script, text, out, tmp_path):
    """The last member is lost in the middle of its line."""
    lines = (out / "members.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "recipe.json").write_text((out / "recipe.json").read_text())
    (tmp_path / "members.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])
    script.main([str(text), "--out", str(tmp_path), *TINY])
    again = (tmp_path / "members.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1] and json.loads(again[-1]) == pytest.approx(
        json.loads(lines[-1])
    )


def test_other_settings_are_refused(script, text, out):
    with pytest.raises(CouplingError, match="rows of other data or settings"):
        script.main([str(text), "--out", str(out), *TINY, "--steps", "7"])
