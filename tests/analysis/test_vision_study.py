"""The study of trained vision transformers: lines as NumPy fits them, tables of every member."""

import json

import numpy as np
import pandas as pd
import pytest
import saved_runs
import vision_study as study

from lm_eval_coupling.errors import CouplingError

DEPTHS, DECAYS = (0.0, 0.1, 0.3), (0.01, 0.05, 0.1, 0.2)


@pytest.fixture
def family(tmp_path):
    """Twelve runs whose accuracy is a line over coupling, at every stochastic depth another one."""
    noise, rows = np.random.default_rng(0), []
    for i, depth in enumerate(DEPTHS):
        for decay in DECAYS:
            coupling = 0.1 + 0.1 * i + noise.normal(0, 0.02)
            accuracy = 0.6 + (0.1 + 0.2 * i) * coupling + noise.normal(0, 0.002)
            name = f"depth-{depth:g}-decay-{decay:g}"
            run = saved_runs.results(
                {"cifar10": saved_runs.task_summary(coupling + 0.01)}, f"/somewhere/{name}"
            )
            run["results"]["cifar10"] |= {"acc,none": accuracy, "acc_stderr,none": 0.01}
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True)
            (folder / f"results_{saved_runs.DATE}.json").write_text(json.dumps(run))
            rows.append(
                {
                    "model": name,
                    "stochastic_depth": depth,
                    "weight_decay": decay,
                    "x": coupling,
                    "y": accuracy,
                }
            )
    facts = pd.DataFrame(rows)
    # As vision_training.py writes them: with the accuracy that it saw itself.
    facts.drop(columns=["x", "y"]).assign(accuracy=0.1).to_csv(tmp_path / "facts.csv", index=False)
    return tmp_path, facts


def test_lines_are_those_of_least_squares(family, capsys):
    folder, facts = family
    study.main(
        [str(folder / "runs"), "--facts", str(folder / "facts.csv"), "--out", str(folder / "out")]
    )
    fits = pd.read_csv(folder / "out" / "vision_fits.csv").set_index("members")
    assert list(fits.index) == [f"stochastic_depth {depth:g}" for depth in DEPTHS] + ["all members"]
    for depth in DEPTHS:
        of = facts[facts["stochastic_depth"] == depth]
        r = np.corrcoef(of["x"], of["y"])[0, 1]
        assert fits.loc[f"stochastic_depth {depth:g}", "r2"] == pytest.approx(r**2)
    assert fits.loc["all members", "n"] == 12
    members = pd.read_csv(folder / "out" / "vision_accuracy.csv")
    assert members["coupling"].to_numpy() == pytest.approx(facts["x"].to_numpy())
    assert members["chance"].to_numpy() == pytest.approx(0.0515802, abs=1e-6)
    for name in ("vision_accuracy", "vision_depth", "vision_decay"):
        assert (folder / "out" / f"{name}.png").stat().st_size > 1000
    assert "all members" in capsys.readouterr().out


def test_another_rank_can_be_chosen_if_it_was_measured(family):
    folder, facts = family
    words = [
        str(folder / "runs"),
        "--facts",
        str(folder / "facts.csv"),
        "--out",
        str(folder / "out"),
        "--rank",
    ]
    study.main([*words, "30"])
    members = pd.read_csv(folder / "out" / "vision_accuracy.csv")
    assert members["coupling"].to_numpy() == pytest.approx(facts["x"].to_numpy() - 0.02)
    with pytest.raises(
        CouplingError, match=r"got rank 7, expected one of the measured ranks \[10, 30\]"
    ):
        study.main([*words, "7"])


def test_members_without_their_settings_are_no_study(family):
    folder, facts = family
    facts[["model"]].assign(family="vit").to_csv(folder / "facts.csv", index=False)
    with pytest.raises(
        CouplingError, match="got no stochastic_depth of the members, expected a facts.csv with it"
    ):
        study.main(
            [
                str(folder / "runs"),
                "--facts",
                str(folder / "facts.csv"),
                "--out",
                str(folder / "out"),
            ]
        )
