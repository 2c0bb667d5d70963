r"""Does coupling depend on the length of the prompt? (Paper, fig. 9.)

python analysis/prompt_length.py OUT [OUT …] --tasks gsm8k --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import by_document, study_tables
from coupling_analysis.missing_documents import describe_missing
from coupling_analysis.study_figures import document_scatter

REGULARITY = ["line_shape_score", "expodistance"]
PRINTED = ["line", "task", "measure", "coefficient", "low", "high", "p", "n"]


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(
        options.runs, options.tasks, weights="trained", measures=["coupling", *REGULARITY]
    )
    rank = study_tables.choose_rank(records, options.rank)
    measures = ["coupling", *study_tables.recorded_measures(records, REGULARITY)]
    rows = study_tables.named(study_tables.long(records, measures, rank), rank)
    bins = study_tables.named(by_document.bin_documents(rows, "n_tokens"), rank)
    correlations = study_tables.named(by_document.correlations(rows, "n_tokens"), rank)
    figure = document_scatter(
        rows,
        bins,
        correlations,
        x="n_tokens",
        x_label="tokens of the prompt",
        title=f"Documents by length of the prompt, K = {rank}; large: medians, quartiles of bins",
    )
    name = command.name_study("prompt_length", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))
    command.save_table(options.out, f"{name}_correlations", correlations)
    command.print_table(correlations[PRINTED])


if __name__ == "__main__":
    command.run(main)
