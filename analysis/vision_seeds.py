r"""Does coupling of vision transformers rise with stochastic depth, beyond seeds? (Paper, fig. 11.)

    for SEED in 0 1 2; do
        python analysis/vision_training.py DATA --out SEEDS/$SEED --output-path SEEDS/$SEED/runs \\
            --seed $SEED --stochastic-depth 0 0.1 --weight-decay 0.05
    done
    python analysis/vision_seeds.py SEEDS/0 SEEDS/1 SEEDS/2 --out figures

Each folder has runs and facts.csv of one seed, which decides first weights, order of images and
augmentation. ``vision_seeds.csv`` has a row for each member. ``vision_seeds_differences.csv`` has
differences from the member without stochastic depth of the same seed and weight decay, with 95 %
t-intervals over seeds.
"""

from __future__ import annotations

from pathlib import Path

import command
import pandas as pd
from paired_seeds import paired_differences
from vision_study import DECAY, DEPTH, SEED, member_rows, setting_panels

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.scores_table import load_runs

OUTCOMES = ("coupling", "accuracy")


def read_seeds(folders: list[Path], decay: float, rank: int | None) -> tuple[pd.DataFrame, int]:
    """Return one row per seed and stochastic depth, at one weight decay, and the rank K."""
    parts = []
    for seed, folder in enumerate(folders):
        runs = load_runs(folder / "runs", facts=folder / "facts.csv")
        rows, rank = member_rows(runs, rank)
        if (rows := rows[rows[DECAY] == decay]).empty:
            raise CouplingError(
                f"got {folder} without a member of weight decay {decay:g}, expected one; "
                "choose another --decay"
            )
        parts.append(rows.assign(**{SEED: seed}))
    assert rank is not None  # as there is a folder
    return pd.concat(parts, ignore_index=True), rank


def differences(members: pd.DataFrame) -> pd.DataFrame:
    """Return differences from the member without stochastic depth of the same seed."""
    named = members.assign(member=[f"{depth:g}" for depth in members[DEPTH]])
    return paired_differences(named, "0", OUTCOMES)


def main(argv=None) -> None:
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add(
        "seeds",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder with the runs and facts.csv of one seed",
    )
    add("--decay", type=float, default=0.05, metavar="X", help="weight decay (%(default)s)")
    add("--rank", type=int, metavar="K", help="number of singular vectors (default: 10)")
    options = parser.parse_args(argv)
    members, rank = read_seeds(options.seeds, options.decay, options.rank)
    # Settings that every seed has.
    members = members[members.groupby(DEPTH)[SEED].transform("nunique") == len(options.seeds)]
    table = differences(members)
    figure = setting_panels(members, DEPTH, SEED, rank)
    command.save(options.out, "vision_seeds", figure, members)
    command.save_table(options.out, "vision_seeds_differences", table)
    command.print_table(table)


if __name__ == "__main__":
    command.run(main)
