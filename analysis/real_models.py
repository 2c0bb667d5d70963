r"""What do a few real models say? Coupling and its rivals beside the score, task by task.

    python analysis/real_models.py OUT [OUT …] --out analysis/results/real
    python analysis/real_models.py analysis/results/real --out analysis/results/real

A few models are no sample: nothing is fitted here. documents.csv has every number of every
document; a folder without tables is read from its documents.csv. models.csv has the mean over
documents of each number by model, weights and task, with its standard error, and the score of the
trained weights. The tasks of a group, such as BLiMP's, count as one. The picture has a panel per
task and a point per model. Printed is the number of tasks that order the models in the same way by
a number as by the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import command
import pandas as pd
from coupling_analysis import study_tables
from matplotlib.figure import Figure

from lm_eval_coupling import load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import (
    add_legend,
    label_y_axis,
    make_grid,
    picture_name,
    set_title,
)
from lm_eval_coupling.figures.palette import assign_colors
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
METRICS = ("acc_norm,none", "acc,none")  # a task is scored by the first that all models have
KEYS = ["model", "fingerprint", "weights", "task", "leaf", "doc_hash"]  # leaf: a group's own task
DOCUMENTS = "documents"


def read_documents(folders: Sequence[Path], runs: pd.DataFrame, rank: int | None) -> pd.DataFrame:
    """Return one row per model, weights, task and document: its ``rank`` K, and every number.

    Raises:
        CouplingError: if the ranks differ, or one name has two models.
    """
    tabled = [folder for folder in folders if any(folder.rglob("*coupling_*.parquet"))]
    files = [folder / f"{DOCUMENTS}.csv" for folder in folders if folder not in tabled]
    if missing := [file for file in files if not file.is_file()]:
        raise CouplingError(
            f"got {missing[0].parent}, which has neither tables of coupling nor {missing[0].name}"
        )
    parts = [pd.read_csv(file, dtype=dict.fromkeys(KEYS, str)) for file in files]
    parts += [_read_tables(tabled, runs, rank)] if tabled else []
    documents = pd.concat(parts, ignore_index=True).drop_duplicates(KEYS, keep="last")
    ranks = sorted(documents["rank"].unique())
    if len(ranks) > 1 or rank not in (None, ranks[0]):
        expected = f"one K = {rank}" if rank else "one K"
        raise CouplingError(f"got numbers at K = {ranks}, expected {expected}")
    fingerprints = documents.groupby("model")["fingerprint"].nunique()
    if (fingerprints > 1).any():
        raise CouplingError(
            f"got two models of the name {fingerprints.idxmax()}, expected one; give folders of "
            "one of them"
        )
    return documents


def _read_tables(folders: Sequence[Path], runs: pd.DataFrame, rank: int | None) -> pd.DataFrame:
    records = study_tables.read(folders, measures=NUMBERS, columns=["fingerprint"])
    rank = study_tables.choose_rank(records, rank)
    measures = study_tables.recorded_measures(records, NUMBERS)
    values = study_tables.long(records, measures, rank)
    fingerprints = records.drop_duplicates("model").set_index("model")["fingerprint"]
    values = values.assign(fingerprint=values["model"].map(fingerprints), leaf=values["task"])
    groups = {(row.fingerprint, row.task): row.group for row in runs.itertuples()}
    leaves = zip(values["fingerprint"], values["leaf"], strict=True)
    values["task"] = [_topmost_group(*leaf, groups) for leaf in leaves]
    wide = values.pivot_table(index=KEYS, columns="measure", values="value", sort=False)
    wide = wide.reset_index()
    wide.insert(len(KEYS), "rank", rank)
    return wide.round(6)


def _topmost_group(fingerprint: str, task: str, groups: Mapping[tuple[str, str], str]) -> str:
    group = groups.get((fingerprint, task))
    return _topmost_group(fingerprint, group, groups) if group else task


def read_scores(runs: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Return one row per model and task: metric, score, standard error and documents.

    Args:
        runs: from :func:`load_runs`.
        names: model names by fingerprint; other models are left out.
    """
    scored = runs[(runs["group"] == "") & runs["fingerprint"].isin(names)]
    scored = scored.assign(model=scored["fingerprint"].map(names), weights="trained")
    # Of several runs of a model, the one with most documents counts.
    scored = scored.sort_values("n_samples").drop_duplicates(["model", "task"], keep="last")
    parts = []
    for _, of_task in scored.groupby("task", sort=False):
        metrics = [name for name in METRICS if name in of_task and of_task[name].notna().any()]
        shared = [name for name in metrics if of_task[name].notna().all()]
        for metric in (shared or metrics)[:1]:
            error = of_task.get(metric.replace(",", "_stderr,"))
            parts.append(
                of_task[["model", "task", "weights"]]
                .assign(measure=metric, mean=of_task[metric], stderr=error, n=of_task["n_samples"])
                .dropna(subset="mean")
            )
    return pd.concat(parts, ignore_index=True)


def mean_numbers(documents: pd.DataFrame) -> pd.DataFrame:
    """Average each number over documents, by task and over all tasks."""
    numbers = [name for name in NUMBERS if name in documents]
    values = documents.melt(KEYS, numbers, var_name="measure").dropna(subset="value")
    by = ["model", "weights", "task", "measure"]
    parts = [study_tables.summarize(of, by) for of in (values, values.assign(task="all"))]
    return pd.concat(parts)[[*by, "mean", "stderr", "n"]]


def count_same_order(means: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Count, for each number, the tasks whose Spearman correlation with the score is positive."""
    trained = means[(means["weights"] == "trained") & (means["task"] != "all")]
    keys = ["model", "task"]
    joined = trained.merge(scores[[*keys, "mean"]], on=keys, suffixes=("", "_score"))
    rows = []
    for name, of in joined.groupby("measure", sort=False):
        coefficients = [
            correlation(of_task["mean"], of_task["mean_score"], method="spearman").coefficient
            for _, of_task in of.groupby("task")
            if len(of_task) > 2 and of_task["mean"].nunique() > 1
        ]
        counts = {"same_way": sum(r > 0 for r in coefficients), "tasks": len(coefficients)}
        rows.append({"number": name, "models": of["model"].nunique()} | counts)
    return pd.DataFrame(rows)


def score_panels(means: pd.DataFrame, scores: pd.DataFrame, rank: int) -> Figure:
    """Draw the score over coupling, a panel per task, with standard errors of both."""
    trained = means[(means["weights"] == "trained") & (means["measure"] == "coupling")]
    both = trained.merge(
        scores.drop(columns="weights"), on=["model", "task"], suffixes=("", "_score")
    )
    tasks = [task for task in dict.fromkeys(scores["task"]) if task in set(both["task"])]
    title = f"Score over coupling, K = {rank}, and their standard errors"
    figure, axes = make_grid(len(tasks), title=title)
    colors = assign_colors(trained["model"])
    for ax, task in zip(axes, tasks, strict=True):
        of_task = both[both["task"] == task]
        for row in of_task.itertuples():
            ax.errorbar(
                row.mean,
                row.mean_score,
                xerr=row.stderr,
                yerr=row.stderr_score,
                fmt="o",
                color=colors[row.model],
                label=picture_name(row.model),
                markersize=4,
            )
        set_title(ax, task)
        ax.set_xlabel("coupling", fontsize="small")
        label_y_axis(ax, of_task["measure_score"].iloc[0].partition(",")[0])
    add_legend(figure, axes)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Read, average, save, and print in how many tasks a number goes with the score."""
    options = command.build_parser(__doc__).parse_args(argv)
    runs = load_runs(options.runs, mixed="keep")
    documents = read_documents(options.runs, runs, options.rank)
    scores = read_scores(runs, documents.set_index("fingerprint")["model"].to_dict())
    if unknown := set(options.tasks or ()) - set(documents["task"]):
        listed = ", ".join(dict.fromkeys(documents["task"]))
        raise CouplingError(f"got task {sorted(unknown)[0]}, expected some of {listed}")
    command.save_table(options.out, DOCUMENTS, documents)
    tasks = options.tasks or [*documents["task"].unique()]
    documents, scores = (rows[rows["task"].isin(tasks)] for rows in (documents, scores))
    means, rank = mean_numbers(documents), int(documents["rank"].iloc[0])
    figure = score_panels(means, scores, rank)
    command.save(options.out, "models", figure, pd.concat([means, scores]).round(6))
    overall = means[means["task"] == "all"].pivot(
        index=["model", "weights"], columns="measure", values="mean"
    )
    print(overall[[name for name in NUMBERS if name in overall]].T.round(4).to_string())
    command.print_table(count_same_order(means, scores))


if __name__ == "__main__":
    command.run(main)
