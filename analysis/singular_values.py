r"""How do singular values of the blocks scale with depth, is 1/σ a line? (Paper, figs. 33 and 34.)

    python analysis/singular_values.py OUT [OUT …] --indices 1 3 10 30 --out figures

Lines are fitted to the medians over documents. Where the runs measured spectra, the table also has
the medians of the fits of single prompts.
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import singular_value_curves
from coupling_analysis.missing_documents import describe_missing
from coupling_analysis.spectra_by_layer import (
    fit_inverses,
    median_document_fits,
    singular_value_rows,
)

COLUMNS = ["singular_values", "depth_slope", "depth_r2"]


def main(argv=None):
    parser = command.build_parser(__doc__)
    help_indices = "numbers k, from 1 (default: 1 3 10 30, as far as measured)"
    parser.add_argument("--indices", type=int, nargs="+", metavar="k", help=help_indices)
    options = parser.parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, columns=COLUMNS)
    most = study_tables.common_ranks(records)[-1]
    indices = options.indices or [k for k in (1, 3, 10, 30) if k <= most]
    values = singular_value_rows(records, indices)
    rows = study_tables.summarize(values, [*study_tables.RUN, "k", "depth"])
    fits = fit_inverses(rows)
    if "depth_slope" in records and records["depth_slope"].notna().any():
        # A left join: not every run measured spectra.
        fits = fits.merge(median_document_fits(records, indices), how="left")
    rows, fits = study_tables.add_line_names(rows), study_tables.add_line_names(fits)
    title = "Singular values of the blocks with depth: median and quartiles over documents"
    figure = singular_value_curves(rows, fits, title=title)
    name = command.name_study("singular_values", records, options.tasks)
    notes = describe_missing(records, columns=["singular_values"])
    command.save(options.out, name, figure, rows.merge(fits), notes)
    command.print_table(fits.drop(columns=["model", "revision"]))


if __name__ == "__main__":
    command.run(main)
