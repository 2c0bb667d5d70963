"""Differences between trainings of the same seed, against scipy's paired t-test."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import saved_runs
import tied_embeddings
import vision_seeds
from paired_seeds import paired_differences
from scipy import stats


def test_intervals_are_those_of_a_paired_test():
    draws = np.random.default_rng(0)
    rows = pd.DataFrame({"seed": [*range(4)] * 2, "member": ["none"] * 4 + ["other"] * 4})
    rows = rows.assign(loss=draws.normal(size=8)).sample(frac=1, random_state=0)
    (row,) = paired_differences(rows, "none", ["loss"]).to_dict("records")
    wide = rows.pivot(index="seed", columns="member", values="loss")
    test = stats.ttest_rel(wide["other"], wide["none"])
    interval = test.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["difference"] == pytest.approx((wide["other"] - wide["none"]).mean())
    assert row["control"] == pytest.approx(wide["none"].mean()) and row["seeds"] == 4


def test_one_seed_has_no_interval():
    rows = pd.DataFrame({"seed": [0, 0], "member": ["none", "other"], "loss": [1.0, 3.0]})
    (row,) = paired_differences(rows, "none", ["loss"]).to_dict("records")
    assert row["difference"] == 2 and np.isnan([row["low"], row["high"]]).all()


def test_tied_and_untied_trainings_are_compared_step_by_step(tmp_path):
    draws, means = np.random.default_rng(1), {}
    for name in ("untied", "tied"):
        steps, seeds, readings = [0, 10, 40], range(3), ["coupling", "rotated", "loss"]
        index = pd.MultiIndex.from_product(
            [readings, seeds, steps], names=["reading", "seed", "step"]
        )
        table = pd.DataFrame({"mean": draws.normal(size=len(index)), "chance": 0.05}, index=index)
        (tmp_path / name).mkdir()
        table.reset_index().to_csv(tmp_path / name / "parts.csv", index=False)
        means[name] = table["mean"]
    folders = [str(tmp_path / name) for name in means]
    tied_embeddings.main([*folders, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "tied.csv").set_index(["reading", "step"])
    for reading, step in rows.index:
        untied, tied = (
            means[name].xs((reading, step), level=("reading", "step")) for name in means
        )
        interval = stats.ttest_rel(tied, untied).confidence_interval()
        bounds = rows.loc[(reading, step), ["low", "high"]]
        assert bounds.tolist() == pytest.approx([interval.low, interval.high])
    assert len(rows) == 9 and (tmp_path / "tied.png").stat().st_size > 1000


def test_vision_transformers_are_compared_within_their_seed(tmp_path):
    couplings = {0: [0.10, 0.13], 1: [0.12, 0.14], 2: [0.11, 0.15]}
    for seed, of in couplings.items():
        facts = []
        for depth, coupling in zip((0.0, 0.1), of, strict=True):
            name = f"depth-{depth:g}-decay-0.05"
            summary = saved_runs.task_summary(coupling + 0.01)
            run = saved_runs.results({"cifar10": summary}, f"/somewhere/{name}")
            run["results"]["cifar10"] |= {"acc,none": 0.5, "acc_stderr,none": 0.01}
            folder = tmp_path / str(seed) / "runs" / name
            folder.mkdir(parents=True)
            (folder / f"results_{saved_runs.DATE}.json").write_text(json.dumps(run))
            facts.append({"model": name, "stochastic_depth": depth, "weight_decay": 0.05})
        pd.DataFrame(facts).to_csv(tmp_path / str(seed) / "facts.csv", index=False)
    folders = [str(tmp_path / str(seed)) for seed in couplings]
    vision_seeds.main([*folders, "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "vision_seeds_differences.csv")
    row = rows[rows["outcome"] == "coupling"].iloc[0]
    interval = stats.ttest_1samp([0.03, 0.02, 0.04], 0).confidence_interval()
    assert [row["difference"], row["low"], row["high"]] == pytest.approx(
        [0.03, interval.low, interval.high], abs=1e-6
    )
    assert (tmp_path / "out" / "vision_seeds.png").stat().st_size > 1000
