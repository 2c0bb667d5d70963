r"""Does tying the embeddings change coupling and its parts? (No figure of the paper.)

    python analysis/training_parts.py TEXT --out UNTIED
    python analysis/training_parts.py TEXT --out TIED --tied
    python analysis/tied_embeddings.py UNTIED TIED --out figures

Reads parts.csv of both, whose members of a seed read the same text in the same order. ``tied.csv``
has, for every step and reading, the difference of tied from untied embeddings with a 95 %
t-interval over seeds, from the means over prompts.
"""

from __future__ import annotations

from pathlib import Path

import command
import pandas as pd
from coupling_analysis.line_figures import curves
from paired_seeds import paired_differences

from lm_eval_coupling.measures.registry import readings

UNTIED, TIED = "untied", "tied"


def differences(untied: pd.DataFrame, tied: pd.DataFrame) -> pd.DataFrame:
    """Return one row per step and reading.

    Args:
        untied: Columns ``reading, seed, step`` and ``mean``.
        tied: The same of the trainings with tied embeddings.
    """
    both = pd.concat([untied.assign(member=UNTIED), tied.assign(member=TIED)])
    wide = both.pivot(index=["step", "seed", "member"], columns="reading", values="mean")
    compared = [
        paired_differences(of.reset_index(), UNTIED, [*wide.columns]).assign(step=step)
        for step, of in wide.groupby("step")
    ]
    return pd.concat(compared, ignore_index=True).rename(columns={"outcome": "reading"})


def ranges(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the mean over seeds and their range, a row for each table, step and reading."""
    parts = []
    for name, table in tables.items():
        of = table.groupby(["reading", "step"], as_index=False, sort=False)
        rows = of.agg(
            median=("mean", "mean"),
            q25=("mean", "min"),
            q75=("mean", "max"),
            chance=("chance", "first"),
            n=("seed", "nunique"),
        )
        parts.append(rows.assign(line=name, weights="trained", undefined=0))
    rows = pd.concat(parts, ignore_index=True)
    labels = {name: readings()[name].label for name in rows["reading"] if name in readings()}
    return rows.assign(panel=rows["reading"].map(labels).fillna("kept-out loss, nats"))


def main(argv=None) -> None:
    parser = command.build_parser(__doc__, runs=False)
    for name in (UNTIED, TIED):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="folder with parts.csv")
    options = parser.parse_args(argv)
    tables = {name: pd.read_csv(getattr(options, name) / "parts.csv") for name in (UNTIED, TIED)}
    table = differences(tables[UNTIED], tables[TIED])
    title = "Trainings with untied and tied embeddings: means and ranges over seeds"
    figure = curves(ranges(tables), x="step", x_label="step", log_x=True, title=title)
    command.save(options.out, "tied", figure, table)
    command.print_table(table[table["step"] == table["step"].max()])


if __name__ == "__main__":
    command.run(main)
