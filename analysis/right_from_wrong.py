r"""Do readings of coupling tell right from wrong answers? (No figure of the paper.)

    lm-eval-coupling fit OUT --out FIT
    python analysis/right_from_wrong.py FIT/documents.csv --out figures

Reads the documents that `fit` wrote, one row per model, task and document, and estimates the area
under the curve for right answers: of each model, and of all together with a document counting
once. The p-values are adjusted for the readings that --readings names, of each line apart.
results/right_from_wrong/plan.md says what was asked before any of its documents was measured.
"""

from __future__ import annotations

from pathlib import Path

import command
import pandas as pd

from lm_eval_coupling.figures.scatter import intervals
from lm_eval_coupling.fit.within_models import POOLED, auroc_table, aurocs
from lm_eval_coupling.saved.csv_file import read_csv
from lm_eval_coupling.statistics import adjust_p_values

READINGS = ["coupling@10", "rotated@10", "deflated@10"]
PRINTED = ["model", "predictor", "auroc", "low", "high", "p", "p_holm", "right", "wrong"]


def areas_of(documents: pd.DataFrame, readings: list[str]) -> pd.DataFrame:
    """Return one row per model, or all models together, and reading, over all tasks.

    Args:
        documents: Columns ``model, task, doc_hash, right`` and the readings.
        readings: Names such as "coupling@10".

    Returns:
        Areas with intervals; ``p_holm`` is adjusted for the readings of a row's model.
    """
    rows = auroc_table(aurocs(documents, readings))
    if documents["task"].nunique() > 1:
        rows = rows[rows["task"] == POOLED].reset_index(drop=True)
    return rows.assign(p_holm=rows.groupby("model")["p"].transform(adjust_p_values))


def read_documents(file: Path, readings: list[str]) -> pd.DataFrame:
    """Read the needed columns of a table of documents.

    Raises:
        CouplingError: if it lacks a column, or has a cell that is no number.
    """
    names, numbers = ["model", "task", "doc_hash"], ["right", *readings]
    table = read_csv(file, [*names, *numbers], "documents")
    texts = {name: table.texts(name) for name in names}
    return pd.DataFrame(texts | {name: table.numbers(name) for name in numbers})


def main(argv=None):
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add("documents", type=Path, metavar="FILE", help="documents.csv of lm-eval-coupling fit")
    add("--readings", nargs="+", default=READINGS, metavar="NAME", help="(default: at K = 10)")
    options = parser.parse_args(argv)
    documents = read_documents(options.documents, options.readings)
    rows = areas_of(documents, options.readings)
    labels = rows["model"] + ": " + rows["predictor"]
    drawn = rows.assign(label=labels, value=rows["auroc"], kind=rows["predictor"])
    figure = intervals(drawn, x_label="AUROC for right answers", chance=0.5)
    command.save(options.out, "right_from_wrong", figure, rows)
    command.save_table(options.out, "documents", documents.round(7))
    command.print_table(rows[PRINTED])


if __name__ == "__main__":
    command.run(main)
