r"""How much does each token of the context move the measured one, layer by layer?

    python analysis/influence.py OUT [OUT …] --last 16 --out figures

Draws norms of the Jacobian between the two tokens. The runs must have measured spectra
(coupling_measures=depth+regularity+spectra).
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.matrix_figures import influence_heatmaps
from coupling_analysis.missing_documents import describe_missing, describe_too_short
from coupling_analysis.spectra_by_layer import influence_rows

NORMS = ["frobenius_norms", "spectral_norms"]


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    help_last = "input tokens to show, up to the measured one (%(default)s)"
    add("--last", type=int, default=16, metavar="N", help=help_last)
    add("--norm", choices=("frobenius", "spectral"), default="frobenius")
    options = parser.parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, columns=NORMS)
    values = influence_rows(records, options.last).rename(columns={options.norm: "value"})
    rows = study_tables.summarize(values, [*study_tables.RUN, "depth", "token"])
    tokens = list(dict.fromkeys(rows["token"]))
    panels = {
        f"{study_tables.label_run(*run)} (n = {of['n'].max()})": of.pivot(
            index="depth", columns="token", values="median"
        )[tokens].to_numpy()
        for run, of in rows.groupby(study_tables.RUN, sort=False)
    }
    label = f"{options.norm} norm of the Jacobian"
    title = "From input token to the measured one: median over documents"
    figure = influence_heatmaps(panels, tokens=tokens, label=label, title=title)
    name = command.name_study("influence", values, options.tasks)
    notes = describe_missing(records, columns=NORMS) + describe_too_short(records, options.last)
    command.save(options.out, name, figure, rows, notes)


if __name__ == "__main__":
    command.run(main)
