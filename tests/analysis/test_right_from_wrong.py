"""Areas of right and wrong answers against Mann and Whitney's count."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from studied import script

from lm_eval_coupling.errors import CouplingError

READINGS = ["coupling@10", "rotated@10", "deflated@10"]
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def documents(tmp_path):
    """Two models, two tasks, 30 documents each; coupling alone is higher where right."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "task": task, "doc_hash": f"{task}{number}", "right": number % 2}
        for model in ("first", "second")
        for task in ("arc", "piqa")
        for number in range(30)
    ]
    frame = pd.DataFrame(rows)
    for reading in READINGS:
        frame[reading] = rng.standard_normal(len(frame))
    frame["coupling@10"] += 2 * frame["right"]
    frame.to_csv(tmp_path / "of_fit.csv", index=False)
    return frame


def pair_share(frame, reading):
    """Return the share of pairs within a task in which the right answer has more."""
    won = pairs = 0
    for _, task in frame.groupby("task"):
        right, wrong = (task.loc[task["right"] == kind, reading] for kind in (1, 0))
        won += stats.mannwhitneyu(right, wrong).statistic
        pairs += len(right) * len(wrong)
    return won / pairs


def test_areas_and_their_adjustment(documents, tmp_path, capsys):
    script("right_from_wrong")([str(tmp_path / "of_fit.csv"), "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "right_from_wrong.csv")
    areas = rows.set_index(["model", "predictor"])["auroc"]
    shares = {
        (model, reading): pair_share(frame, reading)
        for model, frame in documents.groupby("model")
        for reading in READINGS
    }
    for key, share in shares.items():
        assert areas[key] == pytest.approx(share)
    together = rows[rows["model"] == "all models"].set_index("predictor")
    for reading in READINGS:
        mean = np.mean([shares[model, reading] for model in ("first", "second")])
        assert together.loc[reading, "auroc"] == pytest.approx(mean)
    p = together["p"].sort_values()
    holm = np.maximum.accumulate(p * [3, 2, 1]).clip(upper=1)
    assert together.loc[p.index, "p_holm"].to_numpy() == pytest.approx(holm.to_numpy())
    assert together.loc["coupling@10", "p_holm"] < 0.001 and (together["p_holm"] < 0.05).sum() == 1
    kept = pd.read_csv(tmp_path / "out" / "documents.csv")
    assert len(kept) == len(documents) and set(READINGS) < set(kept)
    assert "coupling@10" in capsys.readouterr().out


def test_a_reading_that_was_not_measured_is_named(documents, tmp_path):
    with pytest.raises(CouplingError, match=r"expected one named rotated@30"):
        script("right_from_wrong")([str(tmp_path / "of_fit.csv"), "--readings", "rotated@30"])
