r"""How straight, how exponential, how even are trajectories, trained beside untrained? (Paper, figs. 5 and 25.)

    python analysis/regularity.py OUT [OUT …] --out figures

The untrained bars are there if the runs measured the twin (coupling_untrained=0).
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables as tables
from coupling_analysis.line_figures import quartile_bars
from coupling_analysis.missing_documents import left_out


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    regularity = ["line_shape_score", "expodistance", "equidistance"]
    records = tables.read(options.runs, options.tasks, measures=regularity)
    rank = tables.choose_rank(records, options.rank)
    measures = tables.recorded(records, regularity, needed=2)
    values = tables.long(records, measures, rank)
    rows = tables.named(tables.quartiles(values, tables.RUN), rank)
    title = "Regularity of trajectories: median and quartiles over documents"
    name = command.of_tasks("regularity", records, options.tasks)
    figure = quartile_bars(rows, columns=len(measures), title=title)
    command.save(options.out, name, figure, rows, left_out(records, measures))
    print(
        rows[["line", "weights", "measure", "q25", "median", "q75", "n", "undefined"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    command.run(main)
