r"""How do singular values of the blocks scale with depth, and is 1/σ a straight line? (Paper, figs. 33 and 34.)

    python analysis/singular_values.py OUT [OUT …] --indices 1 3 10 30 --out figures

Lines are fitted to the medians over documents; where the runs measured spectra, the table has the medians of the fits of
single prompts, too.
"""

from __future__ import annotations

import command
from coupling_analysis import spectra_by_layer as singular_values
from coupling_analysis import study_tables as tables
from coupling_analysis.line_figures import singular_values as draw
from coupling_analysis.missing_documents import left_out


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--indices",
        type=int,
        nargs="+",
        metavar="k",
        help="which ones, from 1 (default: 1 3 10 … measured)",
    )
    options = parser.parse_args(argv)
    records = tables.read(
        options.runs, options.tasks, columns=["singular_values", "depth_slope", "depth_r2"]
    )
    most = tables.common_ranks(records)[-1]
    indices = options.indices or [k for k in (1, 3, 10, 30) if k <= most]
    rows = tables.summary(
        singular_values.singular_values(records, indices), [*tables.RUN, "k", "depth"]
    )
    fits = singular_values.inverse_fits(rows)
    if "depth_slope" in records and records["depth_slope"].notna().any():
        fits = fits.merge(
            singular_values.document_fits(records, indices), how="left"
        )  # not every run measured spectra
    rows, fits = tables.with_line(rows), tables.with_line(fits)
    title = "Singular values of the blocks with depth: median and quartiles over documents"
    name = command.of_tasks("singular_values", records, options.tasks)
    missing = left_out(records, columns=["singular_values"])
    command.save(options.out, name, draw(rows, fits, title=title), rows.merge(fits), missing)
    print(fits.drop(columns=[*tables.RUN[:2]]).to_string(index=False))


if __name__ == "__main__":
    command.run(main)
