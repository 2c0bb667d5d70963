r"""How much does each token of the context move the measured one, layer by layer? Norms of J between the two.

    python analysis/influence.py OUT [OUT …] --last 16 --out figures

The runs must have measured spectra (coupling_measures=depth+regularity+spectra).
"""

from __future__ import annotations

import command
from coupling_analysis import spectra_by_layer as singular_values
from coupling_analysis import study_tables as tables
from coupling_analysis.matrix_figures import influence as draw
from coupling_analysis.missing_documents import left_out, too_short


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--last",
        type=int,
        default=16,
        metavar="N",
        help="tokens up to the measured one (%(default)s)",
    )
    parser.add_argument("--norm", choices=("frobenius", "spectral"), default="frobenius")
    options = parser.parse_args(argv)
    records = tables.read(
        options.runs, options.tasks, columns=["frobenius_norms", "spectral_norms"]
    )
    values = singular_values.influence(records, options.last)
    rows = tables.summary(
        values.rename(columns={options.norm: "value"}), [*tables.RUN, "depth", "token"]
    )
    names = list(dict.fromkeys(rows["token"]))
    panels = {
        f"{tables.label(*run)} (n = {of['n'].max()})": of.pivot(
            index="depth", columns="token", values="median"
        )[names].to_numpy()
        for run, of in rows.groupby(tables.RUN, sort=False)
    }
    title = "From input token to the measured one: median over documents"
    figure = draw(panels, tokens=names, label=f"{options.norm} norm of the Jacobian", title=title)
    name = command.of_tasks("influence", values, options.tasks)
    missing = left_out(records, columns=["frobenius_norms", "spectral_norms"])
    command.save(options.out, name, figure, rows, [*missing, *too_short(records, options.last)])


if __name__ == "__main__":
    command.run(main)
