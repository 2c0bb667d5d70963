r"""What the records of the zoo say: does coupling go with a score, given size or loss, in recipes not seen, along training?

    python analysis/zoo_findings.py analysis/results/zoo --out analysis/results/zoo

Reads runs and facts.csv of the folder (see zoo.py). members.csv has one row per finished member; predictors.csv, for every
score, predictor and what is held fixed, the partial correlation and how well recipes of other families are predicted without
and with it; seeds.csv how much of a number's spread is that of seeds alone; along.csv every checkpoint, along_training.csv
how numbers go together over the steps of one member. Members are relatives of one recipe: p-values hold for this zoo alone.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import command
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lm_eval_coupling import load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import grid, legend_outside
from lm_eval_coupling.figures.palette import CATEGORIES
from lm_eval_coupling.statistics import adjust_p_values, correlation, nested_models

SCORES = {
    "blimp": ("acc,none", 1),
    "kept_out": ("bits_per_byte,none", -1),
}  # and the sign that makes larger better
SIZE = ["log10_params", "n_layers", "d_model"]
MAIN = "coupling@10"


def read(folder: Path) -> pd.DataFrame:
    """One row per checkpoint and task: ``score`` (larger is better), ``bits`` of the kept-out text, facts, predictors."""
    runs = load_runs(folder / "runs", facts=folder / "facts.csv")
    if missing := [task for task in SCORES if task not in set(runs["task"])]:
        raise CouplingError(
            f"got {folder} without results of {missing[0]}, expected the records of a zoo"
        )
    rows = runs[runs["task"].isin(SCORES)].copy()
    planned = pd.read_csv(folder / "facts.csv")
    steps = planned["model"].str.rpartition("-")[2].astype(int).groupby(planned["member"]).max()
    rows["last_step"] = rows["member"].map(steps)
    rows["score"] = [
        SCORES[row["task"]][1] * row[SCORES[row["task"]][0]] for row in rows.to_dict("records")
    ]
    bits = rows[rows["task"] == "kept_out"].set_index("model")["bits_per_byte,none"]
    rows["bits"] = rows["model"].map(bits)
    rows["log10_params"] = np.log10(rows["n_params"])
    rows["log10_tokens"] = np.log10(rows["training_tokens"].where(rows["training_tokens"] > 0))
    return rows


def predictors(rows: pd.DataFrame) -> list[str]:
    """Every measured number that has a standard error over documents and differs among the members."""
    measured = [
        name
        for name in rows
        if name.replace("@", "_stderr@") in rows and "@" in name and "_stderr" not in name
    ]
    measured += [name for name in rows if f"{name}_stderr" in rows]
    varying = [
        name
        for name in dict.fromkeys(measured)
        if rows[name].notna().all() and rows[name].std() > 0
    ]
    return [MAIN, *(name for name in varying if name != MAIN)]


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of every member; where its evaluation is missing, there is none."""
    return rows[rows["step"] == rows["last_step"]]


def said_of_scores(last: pd.DataFrame) -> Iterator[dict]:
    """For both scores, all members and those of clean text, every predictor, and several numbers held fixed."""
    for task in SCORES:
        for subset in ("all", "unspoiled"):
            rows = last[
                (last["task"] == task) & ((subset == "all") | (last["family"] != "spoiled"))
            ]
            given = {"nothing": [], "size": SIZE, "size and tokens": [*SIZE, "log10_tokens"]}
            given |= {"loss": ["bits"], "loss and size": ["bits", *SIZE]} if task == "blimp" else {}
            names = predictors(rows)
            for words, fixed in given.items():
                for name in [
                    *names,
                    *(["bits"] if task == "blimp" and "bits" not in fixed else []),
                ]:
                    yield {"score": task, "members": subset, "given": words} | one_predictor(
                        rows, name, fixed
                    )


def one_predictor(rows: pd.DataFrame, name: str, fixed: list[str]) -> dict:
    """Partial correlation with the score, Spearman's where nothing is fixed, and prediction of families left out."""
    fixed = [column for column in fixed if rows[column].nunique() > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of collinear covariates; the notes of the result say so
        found = nested_models(
            rows, score="score", predictor=name, covariates=fixed, family="family"
        )
    partial = found.partial
    about = {
        "predictor": name,
        "n": found.n,
        "r": partial.coefficient,
        "low": partial.low,
        "high": partial.high,
    }
    about |= {"p": partial.p, "vif": found.vif}
    about |= {"r2_left_out_family_without": found.without.r2_left_out_family}
    about |= {"r2_left_out_family_with": found.with_predictor.r2_left_out_family}
    ranks = correlation(rows[name], rows["score"], method="spearman") if not fixed else None
    return about | ({"spearman": ranks.coefficient, "spearman_p": ranks.p} if ranks else {})


def seeds(last: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over the seeds of the standard recipe and over the zoo, of scores and predictors."""
    rows = []
    for task, of in last.groupby("task"):
        same = of[of["family"] == "standard"]
        for name in ["score", *predictors(of)]:
            spread = {"seeds": same[name].std(), "zoo": of[name].std()}
            share = 1 - (spread["seeds"] / spread["zoo"]) ** 2 if spread["zoo"] > 0 else np.nan
            counts = {"n_seeds": len(same), "n_zoo": len(of)}
            rows.append(
                {"task": task, "number": name} | counts | spread | {"share_not_of_seeds": share}
            )
    return pd.DataFrame(rows)


def along(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman of coupling and score over the checkpoints of one member, of levels and of changes."""
    found = []
    for (member, task), of in rows.groupby(["member", "task"]):
        of = of.sort_values("step")
        if len(of) < 4:
            continue
        for kind, x, y in (
            ("levels", of[MAIN], of["score"]),
            ("changes", of[MAIN].diff().iloc[1:], of["score"].diff().iloc[1:]),
        ):
            r = correlation(x.to_numpy(), y.to_numpy(), method="spearman")
            found.append(
                {
                    "member": member,
                    "score": task,
                    "of": kind,
                    "spearman": r.coefficient,
                    "p": r.p,
                    "n": r.n,
                }
            )
    return pd.DataFrame(found)


def picture(rows: pd.DataFrame, last: pd.DataFrame) -> Figure:
    """Both scores over coupling, a point a member; and both ways of coupling and bits along training."""
    figure, axes = grid(
        4,
        width=4.2,
        height=3.4,
        columns=2,
        title=f"The zoo: {last['member'].nunique()} members, {MAIN}",
    )
    families = list(dict.fromkeys(last["family"]))
    colour = dict(zip(families, itertools.cycle(CATEGORIES), strict=False))
    shape = {
        family: "os^"[i // len(CATEGORIES)] for i, family in enumerate(families)
    }  # colours come again
    labels = {"blimp": "BLiMP, accuracy", "kept_out": "kept-out text, bits per byte"}
    for ax, (task, label) in zip(axes[:2], labels.items(), strict=True):
        for family, of in last[last["task"] == task].groupby("family", sort=False):
            ax.plot(
                of[MAIN],
                of["score"].abs(),
                shape[family],
                markersize=4,
                color=colour[family],
                label=family,
            )
        ax.set_xlabel(MAIN, fontsize="small")
        ax.set_ylabel(label, fontsize="small")
    paths = rows[
        (rows["task"] == "kept_out")
        & (rows.groupby(["member", "task"])["step"].transform("nunique") > 3)
    ]
    for member, of in paths.groupby("member", sort=False):
        of = of.sort_values("step")
        style = {
            "marker": shape[of["family"].iloc[0]],
            "markersize": 3,
            "linewidth": 1,
            "color": colour[of["family"].iloc[0]],
        }
        for ax, x in ((axes[2], of["step"]), (axes[3], of["bits"])):
            ax.plot(x, of[MAIN], **style)
            ax.annotate(member, (x.iloc[-1], of[MAIN].iloc[-1]), fontsize="xx-small")
            ax.set_ylabel(f"{MAIN}, kept-out text", fontsize="small")
    axes[2].set_xscale("symlog", linthresh=10)
    axes[2].set_xlabel("step", fontsize="small")
    axes[3].invert_xaxis()
    axes[3].set_xlabel("bits per byte (training goes right)", fontsize="small")
    legend_outside(figure, axes)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Read, ask, save, and print what is held fixed against what is left."""
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument(
        "records",
        type=Path,
        metavar="RECORDS",
        help="folder with runs and facts.csv, see zoo.py --records",
    )
    options: argparse.Namespace = parser.parse_args(argv)
    rows = read(options.records)
    last = finished(rows)
    numbers = ["score", "acc_stderr,none", "bits", *predictors(last)]
    numbers += [f"{MAIN}".replace("@", "_stderr@")]
    about = [
        "member",
        "family",
        "task",
        "step",
        "training_tokens",
        "n_params",
        "n_layers",
        "d_model",
    ]
    found = pd.DataFrame(said_of_scores(last))
    groups = found.groupby(["score", "members", "given"], sort=False)
    found["p_holm"] = groups["p"].transform(adjust_p_values)
    command.save_table(
        options.out, "members", last[[*about, *numbers]].sort_values(["task", "member"])
    )
    command.save_table(options.out, "predictors", found.round(6))
    command.save_table(options.out, "seeds", seeds(last).round(6))
    command.save_table(options.out, "along_training", along(rows).round(6))
    command.save(
        options.out,
        "along",
        picture(rows, last),
        rows[[*about, *numbers]].sort_values(["task", "member", "step"]),
    )
    shown = [
        "score",
        "members",
        "given",
        "predictor",
        "n",
        "r",
        "low",
        "high",
        "p",
        "r2_left_out_family_with",
    ]
    print(found[found["predictor"].isin([MAIN, "bits"])][shown].round(3).to_string(index=False))


if __name__ == "__main__":
    command.run(main)
