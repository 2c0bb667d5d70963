r"""Does coupling of vision transformers go with their accuracy? (Paper, figs. 6, 10 and 11.)

    python analysis/vision_training.py DATA --out FAMILY --output-path RESULTS
    python analysis/vision_study.py RESULTS --facts FAMILY/facts.csv --out figures

Reads the runs that `lm-eval-coupling vision` left of every member. ``vision_members.csv`` has a row
for each, ``vision_fits.csv`` the line of accuracy over coupling at every stochastic depth and over
all members. ``vision_accuracy`` draws these, ``vision_depth`` and ``vision_decay`` coupling and
accuracy over stochastic depth and weight decay.
"""

from __future__ import annotations

from pathlib import Path

import command
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import add_legend, draw_chance_line, make_grid
from lm_eval_coupling.figures.palette import assign_colors
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.statistics import Fit, line_fit

DEPTH, DECAY, SEED = "stochastic_depth", "weight_decay", "seed"
NAMES = {DEPTH: "stochastic depth", DECAY: "weight decay", SEED: "seed"}
ALL = "all members"
OTHERS = ("line_shape_score", "expodistance", "measured", "epochs", "loss")


def member_rows(runs: pd.DataFrame, rank: int | None) -> tuple[pd.DataFrame, int]:
    """Return one row per member, with accuracy and coupling and their errors, and the rank K."""
    if missing := [name for name in (DEPTH, DECAY) if name not in runs or runs[name].isna().all()]:
        raise CouplingError(
            f"got no {missing[0]} of the members, expected a facts.csv with it; see "
            "vision_training.py"
        )
    ranks = sorted(int(name.split("@")[1]) for name in runs if str(name).startswith("coupling@"))
    if rank is None and ranks:
        rank = 10 if 10 in ranks else ranks[0]
    if rank not in ranks:
        raise CouplingError(f"got rank {rank}, expected one of the measured ranks {ranks}")
    columns = {
        "acc,none": "accuracy",
        "acc_stderr,none": "accuracy_stderr",
        f"coupling@{rank}": "coupling",
        f"coupling_stderr@{rank}": "coupling_stderr",
        f"chance@{rank}": "chance",
    }
    # facts.csv has an accuracy of its own, taken at the end of training.
    rows = runs.dropna(subset=[DEPTH, DECAY]).drop(columns=[*columns.values()], errors="ignore")
    rows = rows.rename(columns=columns)
    rows["model"] = [Path(model).name for model in rows["model"]]
    others = [name for name in OTHERS if name in runs]
    rows = rows[["model", DEPTH, DECAY, *columns.values(), *others]]
    return rows.sort_values([DEPTH, DECAY], ignore_index=True), rank


def fit_lines(members: pd.DataFrame) -> dict[str, Fit]:
    """Fit accuracy over coupling by least squares, at every stochastic depth and over all."""
    groups = {f"{DEPTH} {depth:g}": of for depth, of in members.groupby(DEPTH)} | {ALL: members}
    return {name: line_fit(of["coupling"], of["accuracy"]) for name, of in groups.items()}


def accuracy_panels(members: pd.DataFrame, fits: dict[str, Fit], rank: int) -> Figure:
    """Draw all members in one panel, then a panel with the line of each stochastic depth."""
    depths = sorted(members[DEPTH].unique())
    colors = assign_colors(depths)
    title = f"Accuracy over coupling, K = {rank}; errors are standard errors"
    figure, axes = make_grid(1 + len(depths), title=title)
    for depth in depths:
        _draw_points(axes[0], members[members[DEPTH] == depth], colors[depth], f"{depth:g}")
    axes[0].set_title(_describe_fit(ALL, fits[ALL]), fontsize="small")
    axes[0].legend(title=NAMES[DEPTH], fontsize="x-small", title_fontsize="x-small", frameon=False)
    for ax, depth in zip(axes[1:], depths, strict=True):
        of, fit = members[members[DEPTH] == depth], fits[f"{DEPTH} {depth:g}"]
        _draw_points(ax, of, colors[depth], None)
        for row in of.itertuples():
            at = (row.coupling, row.accuracy)
            ax.annotate(f"{row.weight_decay:g}", at, (4, 4), textcoords="offset points", size=6)
        if fit.parameters is not None:
            x = np.linspace(of["coupling"].min(), of["coupling"].max(), 50)
            ax.plot(x, fit.predict(x), color="0.3", linewidth=1)
        ax.set_title(_describe_fit(f"{NAMES[DEPTH]} {depth:g}", fit), fontsize="small")
    for ax in axes:
        ax.set(xlabel="coupling", ylabel="accuracy")
    return figure


def setting_panels(members: pd.DataFrame, x: str, line: str, rank: int) -> Figure:
    """Draw coupling and accuracy over one setting, a line for every value of the other."""
    colors = assign_colors(sorted(members[line].unique()))
    figure, axes = make_grid(2, title=f"Coupling (K = {rank}) and accuracy over {NAMES[x]}")
    for ax, y in zip(axes, ("coupling", "accuracy"), strict=True):
        for value, of in members.sort_values(x).groupby(line):
            ax.errorbar(
                of[x],
                of[y],
                of[f"{y}_stderr"].fillna(0),
                fmt="o-",
                color=colors[value],
                markersize=3,
                linewidth=1,
                label=f"{NAMES[line]} {value:g}",
            )
        ax.set(xlabel=NAMES[x], ylabel=y)
        if x == DECAY:
            ax.set_xscale("log")
    if (chance := members["chance"].iloc[0]) > 0:
        draw_chance_line(axes[0], chance)
    add_legend(figure, axes)
    return figure


def _draw_points(ax: Axes, rows: pd.DataFrame, color: str, label: str | None) -> None:
    ax.errorbar(
        rows["coupling"],
        rows["accuracy"],
        xerr=rows["coupling_stderr"].fillna(0),
        yerr=rows["accuracy_stderr"].fillna(0),
        fmt="o",
        color=color,
        markersize=4,
        elinewidth=0.8,
        label=label,
    )


def _describe_fit(name: str, fit: Fit) -> str:
    return name if fit.parameters is None else f"{name}: R² = {fit.r2:.2f}, n = {fit.n}"


def main(argv=None) -> None:
    parser = command.build_parser(__doc__)
    help_facts = "facts.csv of the family"
    parser.add_argument("--facts", type=Path, required=True, metavar="CSV", help=help_facts)
    options = parser.parse_args(argv)
    runs = load_runs(options.runs, facts=options.facts)
    if options.tasks:
        runs = runs[runs["task"].isin(options.tasks)]
    members, rank = member_rows(runs, options.rank)
    fits = fit_lines(members)
    table = pd.DataFrame([{"members": name} | fit.to_dict() for name, fit in fits.items()])
    command.save_table(options.out, "vision_fits", table)
    figures = {
        "vision_accuracy": accuracy_panels(members, fits, rank),
        "vision_depth": setting_panels(members, DEPTH, DECAY, rank),
        "vision_decay": setting_panels(members, DECAY, DEPTH, rank),
    }
    for name, figure in figures.items():
        command.save(options.out, name, figure, members)
    printed = [name for name in ("members", "n", "r2", "slope", "p") if name in table]
    command.print_table(table[printed])


if __name__ == "__main__":
    command.run(main)
