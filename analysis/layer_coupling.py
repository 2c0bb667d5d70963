r"""How strongly is each layer coupled to the others? Median over documents with quartiles, beside chance (paper, fig. 15).

python analysis/layer_coupling.py OUT [OUT …] --tasks gsm8k --out figures
"""

from __future__ import annotations

import command

from lm_eval_coupling.figures.lines import curves
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.studies import tables


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    records = tables.read(options.runs, options.tasks, measures=["layer_coupling"])
    rank = tables.choose_rank(records, options.rank)
    values = tables.long(records, ["layer_coupling", "layer_coupling_as_basis"], rank)
    rows = tables.named(tables.quartiles(values, tables.RUN), rank)
    title = f"Coupling of each layer, K = {rank}: median and quartiles over documents"
    command.save(options.out, "layer_coupling", curves(rows, columns=2, title=title), rows)
    known = rows[rows["measure"] == "layer_coupling"].dropna(subset="median")
    for line, of in known.groupby(["line", "weights"], sort=False):
        best = of.loc[of["median"].idxmax()]
        chance = readings()["layer_coupling"].chance_at(rank)
        print(f"{', '.join(line)}: most coupled is layer {best['depth']:.0f}, {best['median']:.3f} (chance {chance:.3f})")


if __name__ == "__main__":
    command.run(main)
