r"""What a few real models say: coupling and its rivals, task by task, trained and untrained, beside the score.

    python analysis/real_models.py OUT [OUT …] --out analysis/results/real
    python analysis/real_models.py analysis/results/real --out analysis/results/real    # of what is committed

Too few models are no sample: nothing is fitted here. documents.csv has every number of every document; a folder without
tables is read from such a file. models.csv has, for every model, weights and task, the mean over documents of
each number with its standard error, and the score of the trained weights. The tasks of a group (BLiMP's) count as one. The
picture has a panel a task, each model a point; printed is in how many tasks the models stand in the same order by a number
as by the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import command
import pandas as pd
from coupling_analysis import study_tables as tables
from matplotlib.figure import Figure

from lm_eval_coupling import load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import grid, legend_outside
from lm_eval_coupling.figures.palette import CATEGORIES
from lm_eval_coupling.statistics import correlation

NUMBERS = (
    "coupling",
    "attention_coupling",
    "mlp_coupling",
    "line_shape_score",
    "expodistance",
    "mean_jacobian_norm",
    "mean_stable_rank",
    "mean_non_normality",
    "mean_symmetric_share",
    "mean_block_influence",
    "mean_linearity",
    "last_state_effective_rank_centred",
)
SCORES = ("acc_norm,none", "acc,none")  # the first that a task has
NAMES = [
    "model",
    "fingerprint",
    "weights",
    "task",
    "leaf",
    "doc_hash",
]  # task: of a group's tasks the topmost group
KEPT = "documents.csv"


def documents(folders: Sequence[Path], runs: pd.DataFrame, asked: int | None) -> pd.DataFrame:
    """One row per model, weights, task and document: its ``rank`` K, and every number.

    Raises:
        CouplingError: if the ranks differ, or one name has two models.
    """
    tabled = [folder for folder in folders if any(folder.rglob("*coupling_*.parquet"))]
    kept = [folder / KEPT for folder in folders if folder not in tabled]
    if lacking := [file for file in kept if not file.is_file()]:
        raise CouplingError(
            f"got {lacking[0].parent}, which has neither tables of coupling nor {KEPT}"
        )
    parts = [pd.read_csv(file, dtype=dict.fromkeys(NAMES, str)) for file in kept]
    parts += [_of_tables(tabled, runs, asked)] if tabled else []
    found = pd.concat(parts, ignore_index=True).drop_duplicates(NAMES, keep="last")
    if found["rank"].nunique() > 1 or asked not in (None, found["rank"].iloc[0]):
        raise CouplingError(
            f"got numbers at K = {sorted(found['rank'].unique())}, expected one K{f' = {asked}' if asked else ''}"
        )
    several = found.groupby("model")["fingerprint"].nunique()
    if (several > 1).any():
        raise CouplingError(
            f"got two models of the name {several.idxmax()}, expected one; give folders of one of them"
        )
    return found


def _of_tables(folders: Sequence[Path], runs: pd.DataFrame, asked: int | None) -> pd.DataFrame:
    records = tables.read(folders, measures=NUMBERS, columns=["fingerprint"])
    rank = tables.choose_rank(records, asked)
    values = tables.long(records, tables.recorded(records, NUMBERS), rank)
    prints = records.drop_duplicates("model").set_index("model")["fingerprint"]
    values = values.assign(fingerprint=values["model"].map(prints), leaf=values["task"])
    above = {(row.fingerprint, row.task): row.group for row in runs.itertuples()}
    values["task"] = [
        _topmost(*key, above) for key in zip(values["fingerprint"], values["leaf"], strict=True)
    ]
    wide = values.pivot_table(
        index=NAMES, columns="measure", values="value", sort=False
    ).reset_index()
    wide.insert(len(NAMES), "rank", rank)
    return wide.round(6)


def _topmost(fingerprint: str, task: str, above: Mapping[tuple[str, str], str]) -> str:
    group = above.get((fingerprint, task))
    return _topmost(fingerprint, group, above) if group else task


def scores(runs: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """One row per model and task, of the models whose weights have ``names``: score, its standard error, and documents."""
    found = runs[(runs["group"] == "") & runs["fingerprint"].isin(names)].copy()
    found["model"] = found["fingerprint"].map(names)
    rows = []
    for row in found.sort_values("n_samples").to_dict("records"):
        metric = next((name for name in SCORES if name in row and pd.notna(row[name])), None)
        if metric:
            error = row.get(metric.replace(",", "_stderr,"))
            about = {
                "model": row["model"],
                "task": row["task"],
                "weights": "trained",
                "measure": metric,
            }
            rows.append(about | {"mean": row[metric], "stderr": error, "n": row["n_samples"]})
    return pd.DataFrame(rows).drop_duplicates(["model", "task"], keep="last")  # of most documents


def means(of_documents: pd.DataFrame) -> pd.DataFrame:
    """Mean over documents of each number, by task and over all of them."""
    numbers = [name for name in NUMBERS if name in of_documents]
    values = of_documents.melt(NAMES, numbers, var_name="measure").dropna(subset="value")
    by = ["model", "weights", "task", "measure"]
    everything = tables.summary(values.assign(task="all"), by)
    return pd.concat([tables.summary(values, by), everything])[[*by, "mean", "stderr", "n"]]


def same_order(found: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """For every number: tasks in which Spearman's correlation over the models with the score is positive, of how many."""
    trained = found[(found["weights"] == "trained") & (found["task"] != "all")]
    joined = trained.merge(
        scored[["model", "task", "mean"]], on=["model", "task"], suffixes=("", "_score")
    )
    rows = []
    for name, of in joined.groupby("measure", sort=False):
        each = [
            correlation(of_task["mean"], of_task["mean_score"], method="spearman").coefficient
            for _, of_task in of.groupby("task")
            if len(of_task) > 2 and of_task["mean"].nunique() > 1
        ]
        up = sum(r > 0 for r in each)
        rows.append(
            {"number": name, "models": of["model"].nunique(), "same_way": up, "tasks": len(each)}
        )
    return pd.DataFrame(rows)


def picture(found: pd.DataFrame, scored: pd.DataFrame, rank: int) -> Figure:
    """The score over coupling, a panel a task, with standard errors of both."""
    trained = found[(found["weights"] == "trained") & (found["measure"] == "coupling")]
    names = [task for task in dict.fromkeys(scored["task"]) if task in set(trained["task"])]
    figure, axes = grid(
        len(names), title=f"Score over coupling, K = {rank}, and their standard errors"
    )
    colour = dict(zip(dict.fromkeys(trained["model"]), CATEGORIES, strict=False))
    for ax, task in zip(axes, names, strict=True):
        both = trained[trained["task"] == task].merge(
            scored[scored["task"] == task], on="model", suffixes=("", "_score")
        )
        for row in both.itertuples():
            errors = {"xerr": row.stderr, "yerr": row.stderr_score}
            ax.errorbar(
                row.mean,
                row.mean_score,
                **errors,
                fmt="o",
                color=colour[row.model],
                label=row.model,
                markersize=4,
            )
        ax.set_title(task, fontsize="small")
        ax.set_xlabel("coupling", fontsize="small")
        ax.set_ylabel("score", fontsize="small")
    legend_outside(figure, axes)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Read, average, save, and print what goes the way of the score."""
    options = command.arguments(__doc__).parse_args(argv)
    runs = load_runs(options.runs, mixed="keep")
    everything = documents(options.runs, runs, options.rank)
    scored = scores(runs, everything.set_index("fingerprint")["model"].to_dict())
    if unknown := set(options.tasks or ()) - set(everything["task"]):
        known = ", ".join(dict.fromkeys(everything["task"]))
        raise CouplingError(f"got task {sorted(unknown)[0]}, expected some of {known}")
    command.save_table(options.out, KEPT.removesuffix(".csv"), everything)
    tasks = options.tasks or [*everything["task"].unique()]
    each, scored = (rows[rows["task"].isin(tasks)] for rows in (everything, scored))
    found, rank = means(each), int(each["rank"].iloc[0])
    command.save(
        options.out, "models", picture(found, scored, rank), pd.concat([found, scored]).round(6)
    )
    overall = found[found["task"] == "all"].pivot(
        index=["model", "weights"], columns="measure", values="mean"
    )
    print(overall[[name for name in NUMBERS if name in overall]].T.round(4).to_string())
    print(same_order(found, scored).to_string(index=False))


if __name__ == "__main__":
    command.run(main)
