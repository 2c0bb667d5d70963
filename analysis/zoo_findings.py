r"""What do the records of the zoo say about coupling and scores?

    python analysis/zoo_findings.py analysis/results/zoo --out analysis/results/zoo

Asks whether coupling goes with a score given size or loss, in recipes that were left out, and along
training. Reads runs and facts.csv of the folder (see zoo.py) and writes:

members.csv         one row per member at its last checkpoint
predictors.csv      for every score, predictor and set of covariates: the partial correlation, and
                    how well families of recipes are predicted that were left out
seeds.csv           how much of a number's spread is due to seeds alone
influence.csv       the partial correlations of coupling and its controls, and their extremes when
                    any one member, or any one family, is left out
along.csv           every checkpoint
along_training.csv  Spearman's correlation over the steps of one member

Members are relatives of one recipe: p-values hold for this zoo alone.
"""

from __future__ import annotations

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
from lm_eval_coupling.figures.canvas import add_legend, make_grid
from lm_eval_coupling.figures.palette import CATEGORIES
from lm_eval_coupling.statistics import (
    adjust_p_values,
    correlation,
    nested_models,
    partial_correlation,
)

# Metric of each task, and the sign that makes larger better.
SCORES = {"blimp": ("acc,none", 1), "kept_out": ("bits_per_byte,none", -1)}
LABELS = {"blimp": "BLiMP, accuracy", "kept_out": "kept-out text, bits per byte"}
SIZE = ["log10_params", "n_layers", "d_model"]
MAIN, MAIN_ERROR = "coupling@10", "coupling_stderr@10"
PARTS = [f"{name}@10" for name in ("coupling", "rotated", "deflated", "without_identity")]
MEMBER = ["member", "family", "task", "step", "training_tokens", "n_params", "n_layers", "d_model"]
PRINTED = ["score", "members", "given", "predictor", "n", "r", "low", "high", "p"]


def read_checkpoints(folder: Path) -> pd.DataFrame:
    """Return one row per checkpoint and task, with facts and predictors.

    ``score`` is signed so that larger is better; ``bits`` are those of the kept-out text.

    Raises:
        CouplingError: if no run has results of the kept-out text.
    """
    runs = load_runs(folder / "runs", facts=folder / "facts.csv")
    if "kept_out" not in set(runs["task"]):
        raise CouplingError(f"got {folder} without results of kept_out, expected those of a zoo")
    rows = runs[runs["task"].isin(SCORES)].copy()
    facts = pd.read_csv(folder / "facts.csv")
    steps = facts["model"].str.rpartition("-")[2].astype(int).groupby(facts["member"]).max()
    rows["last_step"] = rows["member"].map(steps)
    scores = []
    for row in rows.to_dict("records"):
        metric, sign = SCORES[row["task"]]
        scores.append(sign * row[metric])
    rows["score"] = scores
    bits = rows[rows["task"] == "kept_out"].set_index("model")["bits_per_byte,none"]
    rows["bits"] = rows["model"].map(bits)
    rows["log10_params"] = np.log10(rows["n_params"])
    rows["log10_tokens"] = np.log10(rows["training_tokens"].where(rows["training_tokens"] > 0))
    return rows


def tasks_of(rows: pd.DataFrame) -> list[str]:
    """Return the tasks that the checkpoints were evaluated on."""
    return [task for task in SCORES if task in set(rows["task"])]


def predictors(rows: pd.DataFrame) -> list[str]:
    """Return the measured numbers that differ among the members, coupling at K = 10 first."""
    measured = [name for name in rows if "@" in name and name.replace("@", "_stderr@") in rows]
    measured += [name for name in rows if f"{name}_stderr" in rows]
    varying = [name for name in measured if rows[name].notna().all() and rows[name].std() > 0]
    return list(dict.fromkeys([MAIN, *varying]))


def select_finished(rows: pd.DataFrame) -> pd.DataFrame:
    """Select the last checkpoint of every member; a member without its evaluation drops out."""
    return rows[rows["step"] == rows["last_step"]]


def relate_predictors(last: pd.DataFrame) -> Iterator[dict]:
    """Relate every predictor to both scores, over all members and those of unspoiled text."""
    for task, subset in itertools.product(tasks_of(last), ("all", "unspoiled")):
        rows = last[(last["task"] == task) & ((subset == "all") | (last["family"] != "spoiled"))]
        covariates = {"nothing": [], "size": SIZE, "size and tokens": [*SIZE, "log10_tokens"]}
        if task == "blimp":
            covariates |= {"loss": ["bits"], "loss and size": ["bits", *SIZE]}
        names = predictors(rows)
        for given, fixed in covariates.items():
            rivals = ["bits"] if task == "blimp" and "bits" not in fixed else []
            for name in [*names, *rivals]:
                about = {"score": task, "members": subset, "given": given}
                yield about | relate_predictor(rows, name, fixed)


def relate_predictor(rows: pd.DataFrame, name: str, fixed: list[str]) -> dict:
    """Return a predictor's partial correlation with the score, and R² of families left out.

    Spearman's correlation is added where nothing is held fixed.
    """
    fixed = [column for column in fixed if rows[column].nunique() > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of collinear covariates, which `vif` shows
        models = nested_models(
            rows, score="score", predictor=name, covariates=fixed, family="family"
        )
    partial = models.partial
    outcome = {
        "predictor": name,
        "n": models.n,
        "r": partial.coefficient,
        "low": partial.low,
        "high": partial.high,
        "p": partial.p,
        "vif": models.vif,
        "r2_left_out_family_without": models.without.r2_left_out_family,
        "r2_left_out_family_with": models.with_predictor.r2_left_out_family,
    }
    if not fixed:
        ranks = correlation(rows[name], rows["score"], method="spearman")
        outcome |= {"spearman": ranks.coefficient, "spearman_p": ranks.p}
    return outcome


def measure_influence(last: pd.DataFrame) -> pd.DataFrame:
    """Relate coupling and its controls to less loss, without each member and each family."""
    rows = last[last["task"] == "kept_out"]
    sets = {"nothing": [], "size": SIZE, "size and tokens": [*SIZE, "log10_tokens"]}
    table = []
    for (given, fixed), name in itertools.product(sets.items(), PARTS):
        if name not in rows:
            continue
        whole = partial_correlation(rows, name, "score", fixed)
        about = {"given": given, "predictor": name, "n": whole.n, "r": whole.coefficient}
        about |= {"low": whole.low, "high": whole.high, "p": whole.p}
        for unit in ("member", "family"):
            without = _leave_out(rows, unit, name, fixed)
            about |= {f"lowest_{unit}": without.idxmin(), f"lowest_without_{unit}": without.min()}
            about |= {f"highest_{unit}": without.idxmax(), f"highest_without_{unit}": without.max()}
        table.append(about)
    return pd.DataFrame(table)


def _leave_out(rows: pd.DataFrame, unit: str, name: str, fixed: list[str]) -> pd.Series:
    """Return the partial correlation with less loss without each member, or without each family."""
    values = {
        key: partial_correlation(rows[rows[unit] != key], name, "score", fixed, resamples=0)
        for key in rows[unit].unique()
    }
    return pd.Series({key: value.coefficient for key, value in values.items()})


def compare_seeds(last: pd.DataFrame) -> pd.DataFrame:
    """Compare each number's spread over seeds of the standard recipe with that over the zoo."""
    rows = []
    for task, of in last.groupby("task"):
        standard = of[of["family"] == "standard"]
        for name in ["score", *predictors(of)]:
            seeds, zoo = standard[name].std(), of[name].std()
            rows.append(
                {"task": task, "number": name, "n_seeds": len(standard), "n_zoo": len(of)}
                | {"seeds": seeds, "zoo": zoo}
                | {"share_not_of_seeds": 1 - (seeds / zoo) ** 2 if zoo > 0 else np.nan}
            )
    return pd.DataFrame(rows)


def correlate_along_training(rows: pd.DataFrame) -> pd.DataFrame:
    """Correlate coupling and score over a member's checkpoints, as levels and as changes."""
    outcomes = []
    for (member, task), of in rows.groupby(["member", "task"]):
        of = of.sort_values("step")
        if len(of) < 4:
            continue
        levels = of[[MAIN, "score"]]
        for kind, values in (("levels", levels), ("changes", levels.diff().iloc[1:])):
            r = correlation(values[MAIN].to_numpy(), values["score"].to_numpy(), method="spearman")
            about = {"member": member, "score": task, "of": kind}
            outcomes.append(about | {"spearman": r.coefficient, "p": r.p, "n": r.n})
    return pd.DataFrame(outcomes)


def draw_zoo(rows: pd.DataFrame, last: pd.DataFrame) -> Figure:
    """Draw scores over coupling, and coupling along training over step and bits."""
    title = f"The zoo: {last['member'].nunique()} members, {MAIN}"
    tasks = tasks_of(last)
    figure, axes = make_grid(2 + len(tasks), width=4.2, height=3.4, columns=2, title=title)
    families = list(dict.fromkeys(last["family"]))
    colors = dict(zip(families, itertools.cycle(CATEGORIES), strict=False))
    # Colors repeat after a while, markers tell the families apart then.
    markers = {family: "os^"[i // len(CATEGORIES)] for i, family in enumerate(families)}
    for ax, task in zip(axes[:-2], tasks, strict=True):
        for family, of in last[last["task"] == task].groupby("family", sort=False):
            style = {"color": colors[family], "markersize": 4, "label": family}
            ax.plot(of[MAIN], of["score"].abs(), markers[family], **style)
        ax.set_xlabel(MAIN, fontsize="small")
        ax.set_ylabel(LABELS[task], fontsize="small")
    checkpoints = rows.groupby(["member", "task"])["step"].transform("nunique")
    paths = rows[(rows["task"] == "kept_out") & (checkpoints > 3)]
    for member, of in paths.groupby("member", sort=False):
        of, family = of.sort_values("step"), of["family"].iloc[0]
        style = {"color": colors[family], "marker": markers[family], "markersize": 3}
        for ax, x in ((axes[-2], of["step"]), (axes[-1], of["bits"])):
            ax.plot(x, of[MAIN], linewidth=1, **style)
            ax.annotate(member, (x.iloc[-1], of[MAIN].iloc[-1]), fontsize="xx-small")
            ax.set_ylabel(f"{MAIN}, kept-out text", fontsize="small")
    axes[-2].set_xscale("symlog", linthresh=10)
    axes[-2].set_xlabel("step", fontsize="small")
    axes[-1].invert_xaxis()
    axes[-1].set_xlabel("bits per byte (training goes right)", fontsize="small")
    add_legend(figure, axes)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Read, relate, save, and print what coupling and loss say given the covariates."""
    parser = command.build_parser(__doc__, runs=False)
    help_records = "folder with runs and facts.csv, see zoo.py --records"
    parser.add_argument("records", type=Path, metavar="RECORDS", help=help_records)
    options = parser.parse_args(argv)
    rows = read_checkpoints(options.records)
    last = select_finished(rows)
    errors = ["acc_stderr,none"] if "acc_stderr,none" in last else []
    columns = [*MEMBER, "score", *errors, "bits", *predictors(last), MAIN_ERROR]
    relations = pd.DataFrame(relate_predictors(last))
    groups = relations.groupby(["score", "members", "given"], sort=False)
    relations["p_holm"] = groups["p"].transform(adjust_p_values)
    tables = {
        "members": last[columns].sort_values(["task", "member"]),
        "predictors": relations.round(6),
        "influence": measure_influence(last).round(6),
        "seeds": compare_seeds(last).round(6),
        "along_training": correlate_along_training(rows).round(6),
    }
    for name, table in tables.items():
        command.save_table(options.out, name, table)
    checkpoints = rows[columns].sort_values(["task", "member", "step"])
    command.save(options.out, "along", draw_zoo(rows, last), checkpoints)
    printed = relations[relations["predictor"].isin([MAIN, "bits"])]
    command.print_table(printed[[*PRINTED, "r2_left_out_family_with"]].round(3))


if __name__ == "__main__":
    command.run(main)
