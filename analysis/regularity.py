r"""How straight, how exponential, how even are trajectories? (Paper, figs. 5 and 25.)

    python analysis/regularity.py OUT [OUT …] --out figures

Untrained weights are drawn beside the trained ones if the runs measured the untrained twin.
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import quartile_bars
from coupling_analysis.missing_documents import describe_missing

REGULARITY = ["line_shape_score", "expodistance", "equidistance"]
PRINTED = ["line", "weights", "measure", "q25", "median", "q75", "n", "undefined"]


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=REGULARITY)
    rank = study_tables.choose_rank(records, options.rank)
    measures = study_tables.recorded_measures(records, REGULARITY, required=2)
    rows = study_tables.quartile_rows(records, measures, rank)
    title = "Regularity of trajectories: median and quartiles over documents"
    figure = quartile_bars(rows, columns=len(measures), title=title)
    name = command.name_study("regularity", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))
    command.print_table(rows[PRINTED])


if __name__ == "__main__":
    command.run(main)
