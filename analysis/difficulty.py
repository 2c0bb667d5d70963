r"""Does coupling depend on how difficult a document is? (Paper, fig. 9.)

    python analysis/difficulty.py OUT --tasks hendrycks_math_algebra --column level
    python analysis/difficulty.py OUT --tasks gsm8k --column answer --count "<<"
    python analysis/difficulty.py OUT --csv difficulty.csv --column difficulty

A document's number is read from its field in lm-eval's samples (--log_samples): "Level 3" gives 3,
and --count counts a text in the field. Or it is read from a CSV file with the columns doc_hash and
--column.
"""

from __future__ import annotations

from pathlib import Path

import command
from coupling_analysis import by_document, study_tables
from coupling_analysis.missing_documents import describe_missing, describe_without_number
from coupling_analysis.study_figures import document_scatter

REGULARITY = ["line_shape_score", "expodistance"]
PRINTED = ["line", "task", "measure", "coefficient", "low", "high", "p", "n"]


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--column", required=True, metavar="NAME", help="field of the documents, or CSV column")
    add("--count", metavar="TEXT", help="count TEXT in the field")
    add("--csv", type=Path, metavar="FILE", help="with the columns doc_hash and NAME")
    options = parser.parse_args(argv)
    records = study_tables.read(
        options.runs, options.tasks, weights="trained", measures=["coupling", *REGULARITY]
    )
    rank = study_tables.choose_rank(records, options.rank)
    if options.csv:
        numbers = by_document.from_csv(options.csv, options.column)
    else:
        numbers = by_document.read_sample_numbers(options.runs, options.column, options.count)
    measures = ["coupling", *study_tables.recorded_measures(records, REGULARITY)]
    values = study_tables.long(records, measures, rank)
    rows = study_tables.named(by_document.join_numbers(values, numbers, "difficulty"), rank)
    bins = study_tables.named(by_document.bin_documents(rows, "difficulty"), rank)
    correlations = study_tables.named(by_document.correlations(rows, "difficulty"), rank)
    figure = document_scatter(
        rows,
        bins,
        correlations,
        x="difficulty",
        x_label=f"{options.column}: times {options.count!r}" if options.count else options.column,
        title=f"Documents by difficulty, K = {rank}; large: medians and quartiles of bins",
    )
    name = command.name_study("difficulty", rows, options.tasks)
    notes = describe_missing(records, measures)
    notes += describe_without_number(values, rows, options.column)
    command.save(options.out, name, figure, rows, notes)
    command.save_table(options.out, f"{name}_correlations", correlations)
    command.print_table(correlations[PRINTED])


if __name__ == "__main__":
    command.run(main)
