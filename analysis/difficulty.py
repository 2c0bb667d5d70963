r"""Does coupling depend on how difficult a document is? (Paper, fig. 9.)

    python analysis/difficulty.py OUT --tasks hendrycks_math_algebra --column level --out figures
    python analysis/difficulty.py OUT --tasks gsm8k --column answer --count "<<" --out figures
    python analysis/difficulty.py OUT --csv difficulty.csv --column difficulty --out figures

The number of a document is taken from its field in lm-eval's samples (--log_samples; from "Level 3" the 3; with --count
how often a text occurs in it), or from a CSV file with the columns doc_hash and --column.
"""

from __future__ import annotations

from pathlib import Path

import command
from coupling_analysis import by_document
from coupling_analysis import study_tables as tables
from coupling_analysis.missing_documents import left_out, without
from coupling_analysis.study_figures import against_number


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--column",
        required=True,
        metavar="NAME",
        help="field of the documents, or column of the CSV file",
    )
    parser.add_argument("--count", metavar="TEXT", help="how often TEXT occurs in the field")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="with the columns doc_hash and NAME"
    )
    options = parser.parse_args(argv)
    regularity = ["line_shape_score", "expodistance"]
    records = tables.read(
        options.runs, options.tasks, weights="trained", measures=["coupling", *regularity]
    )
    rank = tables.choose_rank(records, options.rank)
    if options.csv:
        numbers = by_document.from_csv(options.csv, options.column)
    else:
        numbers = by_document.fields(options.runs, options.column, options.count)
    measures = ["coupling", *tables.recorded(records, regularity)]
    values = tables.long(records, measures, rank)
    rows = tables.named(by_document.against(values, numbers, "difficulty"), rank)
    missing = [*left_out(records, measures), *without(values, rows, options.column)]
    bins = tables.named(by_document.bins(rows, "difficulty"), rank)
    found = tables.named(by_document.correlations(rows, "difficulty"), rank)
    x_label = f"{options.column}: times {options.count!r}" if options.count else options.column
    title = f"Documents by difficulty, K = {rank}; large: medians and quartiles of bins"
    figure = against_number(rows, bins, found, x="difficulty", x_label=x_label, title=title)
    name = command.of_tasks("difficulty", rows, options.tasks)
    command.save(options.out, name, figure, rows, missing)
    command.save_table(options.out, f"{name}_correlations", found)
    print(
        found[["line", "task", "measure", "coefficient", "low", "high", "p", "n"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    command.run(main)
