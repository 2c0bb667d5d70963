r"""How strongly is each layer coupled to the others? Median over documents with quartiles, beside chance (paper, fig. 15).

python analysis/layer_coupling.py OUT [OUT …] --tasks gsm8k --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables as tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import left_out

from lm_eval_coupling.measures.registry import readings


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    measures = ["layer_coupling", "layer_coupling_as_basis"]
    records = tables.read(options.runs, options.tasks, measures=measures)
    rank = tables.choose_rank(records, options.rank)
    values = tables.long(records, measures, rank)
    rows = tables.named(tables.quartiles(values, tables.RUN), rank)
    title = f"Coupling of each layer, K = {rank}: median and quartiles over documents"
    name = command.of_tasks("layer_coupling", records, options.tasks)
    command.save(
        options.out, name, curves(rows, columns=2, title=title), rows, left_out(records, measures)
    )
    known = rows[rows["measure"] == "layer_coupling"].dropna(subset="median")
    for line, of in known.groupby(["line", "weights"], sort=False):
        best = of.loc[of["median"].idxmax()]
        chance = readings()["layer_coupling"].chance_at(rank)
        print(
            f"{', '.join(line)}: most coupled is layer {best['depth']:.0f}, {best['median']:.3f} (chance {chance:.3f})"
        )


if __name__ == "__main__":
    command.run(main)
