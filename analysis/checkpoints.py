r"""Does coupling emerge during training? Checkpoints of one model, step by step (paper, figs. 1b and 27–30).

    lm_eval --model coupling-hf --model_args pretrained=EleutherAI/pythia-410m,revision=step1000 …   # and other steps
    python analysis/checkpoints.py OUT [OUT …] --out figures

Steps are read from revisions such as step1000 and from folders such as checkpoint-1000.
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables as tables
from coupling_analysis import training_steps as training
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import left_out


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    regularity = ["line_shape_score", "expodistance", "equidistance"]
    records = tables.read(options.runs, options.tasks, measures=["coupling", *regularity])
    everything, records = records, training.with_steps(records)
    others = sorted({*everything["model"]} - {*records["model"]})
    missing = (
        [f"{len(others)} models left out (no step in their name: {', '.join(others)})"]
        if others
        else []
    )
    rank = tables.choose_rank(records, options.rank)
    measures = ["coupling", *tables.recorded(records, regularity)]
    values = tables.quartiles(tables.long(records, measures, rank), tables.RUN)
    rows = training.with_steps(tables.named(values, rank)).sort_values("step")
    rows["line"] = rows["lineage"]
    title = f"Along training, K = {rank}: median and quartiles over documents"
    figure = curves(rows, x="step", x_label="step", log_x=True, columns=2, title=title)
    name = command.of_tasks("checkpoints", records, options.tasks)
    command.save(options.out, name, figure, rows, [*missing, *left_out(records, measures)])
    layers = tables.quartiles(tables.long(records, ["layer_coupling"], rank), tables.RUN)
    layers = training.with_steps(tables.named(layers, rank)).sort_values("step")
    layers["line"] = [f"{row.lineage}, step {row.step:.0f}" for row in layers.itertuples()]
    figure = curves(layers, columns=1, title="Coupling of each layer, by step")
    name = command.of_tasks("checkpoints_layers", records, options.tasks)
    command.save(
        options.out, name, figure, layers, [*missing, *left_out(records, ["layer_coupling"])]
    )


if __name__ == "__main__":
    command.run(main)
