r"""How strongly is each layer coupled to the others? Medians and quartiles (paper, fig. 15).

python analysis/layer_coupling.py OUT [OUT …] --tasks gsm8k --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import describe_missing

MEASURES = ["layer_coupling", "layer_coupling_as_basis"]


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=MEASURES)
    rank = study_tables.choose_rank(records, options.rank)
    rows = study_tables.quartile_rows(records, MEASURES, rank)
    title = f"Coupling of each layer, K = {rank}: median and quartiles over documents"
    figure = curves(rows, columns=2, title=title, share_y=True)
    name = command.name_study("layer_coupling", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, MEASURES))
    defined = rows[rows["measure"] == "layer_coupling"].dropna(subset="median")
    for line, of in defined.groupby(["line", "weights"], sort=False):
        best = of.loc[of["median"].idxmax()]
        command.say(
            f"{', '.join(line)}: most coupled is layer {best['depth']:.0f}, "
            f"{best['median']:.3f} (chance {best['chance']:.3f})"
        )


if __name__ == "__main__":
    command.run(main)
