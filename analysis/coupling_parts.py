r"""What is coupling made of? (No figure of the paper.)

    python analysis/coupling_parts.py OUT [OUT …] --out figures

Draws coupling beside its controls: with both bases turned alike, without the first pair of
singular vectors, without the multiple of the identity. Chance is the same for all of these. Two
further panels show the share of the first pair, and whether blocks erase along their strongest
directions. The runs need coupling_measures=depth+controls+without_identity.
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import quartile_bars
from coupling_analysis.missing_documents import describe_missing

PARTS = ["coupling", "rotated", "deflated", "without_identity", "one_pair", "erasing"]
PRINTED = ["line", "weights", "measure", "mean", "stderr", "n", "undefined"]


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=PARTS)
    rank = study_tables.choose_rank(records, options.rank)
    measures = study_tables.recorded_measures(records, PARTS, required=3)
    rows = study_tables.quartile_rows(records, measures, rank)
    title = f"Parts of coupling, K = {rank}: median and quartiles over documents"
    figure = quartile_bars(rows, columns=3, title=title)
    name = command.name_study("coupling_parts", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))
    command.print_table(rows[PRINTED])


if __name__ == "__main__":
    command.run(main)
