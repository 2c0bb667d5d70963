r"""Does coupling depend on the length of the prompt? (Paper, fig. 9.)

python analysis/prompt_length.py OUT [OUT …] --tasks gsm8k --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import by_document
from coupling_analysis import study_tables as tables
from coupling_analysis.missing_documents import left_out
from coupling_analysis.study_figures import against_number


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    regularity = ["line_shape_score", "expodistance"]
    records = tables.read(
        options.runs, options.tasks, weights="trained", measures=["coupling", *regularity]
    )
    rank = tables.choose_rank(records, options.rank)
    measures = ["coupling", *tables.recorded(records, regularity)]
    rows = tables.named(tables.long(records, measures, rank), rank)
    bins = tables.named(by_document.bins(rows, "n_tokens"), rank)
    found = tables.named(by_document.correlations(rows, "n_tokens"), rank)
    title = (
        f"Documents by the length of their prompt, K = {rank}; large: medians and quartiles of bins"
    )
    figure = against_number(
        rows, bins, found, x="n_tokens", x_label="tokens of the prompt", title=title
    )
    name = command.of_tasks("prompt_length", records, options.tasks)
    command.save(options.out, name, figure, rows, left_out(records, measures))
    command.save_table(options.out, f"{name}_correlations", found)
    print(
        found[["line", "task", "measure", "coefficient", "low", "high", "p", "n"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    command.run(main)
