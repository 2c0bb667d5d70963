r"""Does coupling emerge during training? Checkpoints of one model, step by step (paper, figs. 1b and 27–30).

    lm_eval --model coupling-hf --model_args pretrained=EleutherAI/pythia-410m,revision=step1000 …   # and other steps
    python analysis/checkpoints.py OUT [OUT …] --out figures

Steps are read from revisions such as step1000 and from folders such as checkpoint-1000.
"""

from __future__ import annotations

import command

from lm_eval_coupling.figures.lines import curves
from lm_eval_coupling.studies import tables, training


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    regularity = ["line_shape_score", "expodistance", "equidistance"]
    records = tables.read(options.runs, options.tasks, measures=["coupling", *regularity])
    records = training.with_steps(records)
    rank = tables.choose_rank(records, options.rank)
    measures = ["coupling", *tables.recorded(records, regularity)]
    values = tables.quartiles(tables.long(records, measures, rank), tables.RUN)
    rows = training.with_steps(tables.named(values, rank)).sort_values("step")
    rows["line"] = rows["lineage"]
    title = f"Along training, K = {rank}: median and quartiles over documents"
    command.save(
        options.out, "checkpoints", curves(rows, x="step", x_label="step", log_x=True, columns=2, title=title), rows
    )
    layers = tables.quartiles(tables.long(records, ["layer_coupling"], rank), tables.RUN)
    layers = training.with_steps(tables.named(layers, rank)).sort_values("step")
    layers["line"] = [f"{row.lineage}, step {row.step:.0f}" for row in layers.itertuples()]
    command.save(
        options.out, "checkpoints_layers", curves(layers, columns=1, title="Coupling of each layer, by step"), layers
    )


if __name__ == "__main__":
    command.run(main)
