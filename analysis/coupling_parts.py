r"""What is coupling made of? (No figure of the paper.)

    python analysis/coupling_parts.py OUT [OUT …] --out figures

Draws coupling beside its controls: with both bases turned alike, without the first pair of
singular vectors, without the multiple of the identity. Two further panels show the share of the
first pair, and whether blocks erase along their strongest directions. Chance is drawn in each. The
values of every document lie beside it. The runs need
coupling_measures=depth+controls+without_identity.
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
    documents = study_tables.long(records, measures, rank)
    rows = study_tables.named(study_tables.quartiles(documents, study_tables.RUN), rank)
    title = f"Parts of coupling, K = {rank}: median and quartiles over documents"
    figure = quartile_bars(rows, columns=3, title=title)
    name = command.name_study("coupling_parts", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))
    document = [*study_tables.RUN, *study_tables.DOCUMENT]
    values = documents.pivot(index=document, columns="measure", values="value").reset_index()
    command.save_table(options.out, f"{name}_documents", values.round(8))
    command.print_table(rows[PRINTED])


if __name__ == "__main__":
    command.run(main)
