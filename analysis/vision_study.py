r"""Does coupling of vision transformers go with their accuracy, at a fixed stochastic depth? (paper, figs. 6, 10 and 11)

    python analysis/vision_training.py DATA --out FAMILY --output-path RESULTS
    python analysis/vision_study.py RESULTS --facts FAMILY/facts.csv --out figures

Reads what `lm-eval-coupling vision` left of every member. ``vision_members.csv`` has a row for each, ``vision_fits.csv`` the
line of accuracy over coupling at every stochastic depth and over all; ``vision_accuracy`` shows them, ``vision_depth`` and
``vision_decay`` how coupling and accuracy go with stochastic depth and with weight decay.
"""

from __future__ import annotations

from pathlib import Path

import command
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures import canvas
from lm_eval_coupling.figures.palette import colours
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.statistics import Fit, line_fit

DEPTH, DECAY = "stochastic_depth", "weight_decay"
ALL = "all members"


def members_of(runs: pd.DataFrame, rank: int | None) -> tuple[pd.DataFrame, int]:
    """One row per member: how it was trained, ``accuracy`` and ``coupling`` with standard errors; and the rank."""
    if missing := [name for name in (DEPTH, DECAY) if name not in runs or runs[name].isna().all()]:
        raise CouplingError(
            f"got no {missing[0]} of the members, expected a facts.csv with it; see vision_training.py"
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
    }
    columns |= {f"coupling_stderr@{rank}": "coupling_stderr", f"chance@{rank}": "chance"}
    kept = [
        name
        for name in ("line_shape_score", "expodistance", "measured", "epochs", "loss")
        if name in runs
    ]
    found = runs.dropna(subset=[DEPTH, DECAY]).drop(
        columns=[*columns.values()], errors="ignore"
    )  # those of the training
    found = found.rename(columns=columns)
    found["model"] = [Path(model).name for model in found["model"]]
    found = found[["model", DEPTH, DECAY, *columns.values(), *kept]]
    return found.sort_values([DEPTH, DECAY], ignore_index=True), rank


def lines(members: pd.DataFrame) -> dict[str, Fit]:
    """Accuracy over coupling, by least squares: at every stochastic depth, and over all."""
    found = {
        f"{DEPTH} {depth:g}": line_fit(of["coupling"], of["accuracy"])
        for depth, of in members.groupby(DEPTH)
    }
    return found | {ALL: line_fit(members["coupling"], members["accuracy"])}


def accuracy_over_coupling(members: pd.DataFrame, fits: dict[str, Fit], rank: int) -> Figure:
    """All members in one panel, then those of every stochastic depth with their line."""
    depths = sorted(members[DEPTH].unique())
    colour = colours(depths)
    figure, axes = canvas.grid(
        1 + len(depths), title=f"Accuracy over coupling, K = {rank}; errors are standard errors"
    )
    for depth in depths:
        _points(axes[0], members[members[DEPTH] == depth], "coupling", colour[depth], f"{depth:g}")
    axes[0].set_title(_titled(ALL, fits[ALL]), fontsize="small")
    axes[0].legend(
        title="stochastic depth", fontsize="x-small", title_fontsize="x-small", frameon=False
    )
    for ax, depth in zip(axes[1:], depths, strict=True):
        of, fit = members[members[DEPTH] == depth], fits[f"{DEPTH} {depth:g}"]
        _points(ax, of, "coupling", colour[depth], None)
        for row in of.itertuples():
            ax.annotate(
                f"{row.weight_decay:g}",
                (row.coupling, row.accuracy),
                (4, 4),
                textcoords="offset points",
                size=6,
            )
        if fit.parameters is not None:
            at = np.linspace(of["coupling"].min(), of["coupling"].max(), 50)
            ax.plot(at, fit.predict(at), color="0.3", linewidth=1)
        ax.set_title(_titled(f"stochastic depth {depth:g}", fit), fontsize="small")
    for ax in axes:
        ax.set(xlabel="coupling", ylabel="accuracy")
    return figure


def over_setting(members: pd.DataFrame, x: str, line: str, rank: int) -> Figure:
    """Coupling and accuracy over one setting, a line for every value of the other."""
    colour = colours(sorted(members[line].unique()))
    names = {DEPTH: "stochastic depth", DECAY: "weight decay"}
    figure, axes = canvas.grid(2, title=f"Coupling (K = {rank}) and accuracy over {names[x]}")
    for ax, y in zip(axes, ("coupling", "accuracy"), strict=True):
        for value, of in members.sort_values(x).groupby(line):
            label = f"{names[line]} {value:g}"
            error = of[f"{y}_stderr"].fillna(0)
            ax.errorbar(
                of[x],
                of[y],
                error,
                fmt="o-",
                color=colour[value],
                markersize=3,
                linewidth=1,
                label=label,
            )
        ax.set(xlabel=names[x], ylabel=y)
        if x == DECAY:
            ax.set_xscale("log")
    if (chance := members["chance"].iloc[0]) > 0:
        canvas.chance_line(axes[0], chance)
    canvas.legend_outside(figure, axes)
    return figure


def _points(ax: Axes, of: pd.DataFrame, x: str, colour: str, label: str | None) -> None:
    errors = {"xerr": of[f"{x}_stderr"].fillna(0), "yerr": of["accuracy_stderr"].fillna(0)}
    ax.errorbar(
        of[x],
        of["accuracy"],
        **errors,
        fmt="o",
        color=colour,
        markersize=4,
        elinewidth=0.8,
        label=label,
    )


def _titled(name: str, fit: Fit) -> str:
    return name if fit.parameters is None else f"{name}: R² = {fit.r2:.2f}, n = {fit.n}"


def main(argv=None) -> None:
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--facts", type=Path, required=True, metavar="CSV", help="facts.csv of the family"
    )
    options = parser.parse_args(argv)
    runs = load_runs(options.runs, facts=options.facts)
    if options.tasks:
        runs = runs[runs["task"].isin(options.tasks)]
    members, rank = members_of(runs, options.rank)
    fits = lines(members)
    table = pd.DataFrame([{"members": name} | fit.to_dict() for name, fit in fits.items()])
    command.save_table(options.out, "vision_fits", table)
    command.save(
        options.out, "vision_accuracy", accuracy_over_coupling(members, fits, rank), members
    )
    command.save(options.out, "vision_depth", over_setting(members, DEPTH, DECAY, rank), members)
    command.save(options.out, "vision_decay", over_setting(members, DECAY, DEPTH, rank), members)
    print(
        table[["members", "n", "r2", "slope", "p"]].to_string(index=False)
        if "slope" in table
        else table.to_string()
    )


if __name__ == "__main__":
    command.run(main)
