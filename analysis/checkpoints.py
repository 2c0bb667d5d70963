r"""Does coupling emerge during training? Checkpoints of one model, by step (figs. 1b and 27–30).

    lm_eval --model coupling-hf --model_args pretrained=EleutherAI/pythia-410m,revision=step1000 …
    python analysis/checkpoints.py OUT [OUT …] --out figures

Steps are read from revisions such as step1000 and from folders such as checkpoint-1000.
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import describe_missing
from coupling_analysis.training_steps import add_steps

REGULARITY = ["line_shape_score", "expodistance", "equidistance"]


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    every = study_tables.read(options.runs, options.tasks, measures=["coupling", *REGULARITY])
    records = add_steps(every)
    rank = study_tables.choose_rank(records, options.rank)
    measures = ["coupling", *study_tables.recorded_measures(records, REGULARITY)]
    rows = add_steps(study_tables.quartile_rows(records, measures, rank)).sort_values("step")
    rows["line"] = rows["lineage"]
    title = f"Along training, K = {rank}: median and quartiles over documents"
    figure = curves(rows, x="step", x_label="step", log_x=True, columns=2, title=title)
    notes = describe_without_step(every, records)
    name = command.name_study("checkpoints", records, options.tasks)
    command.save(options.out, name, figure, rows, [*notes, *describe_missing(records, measures)])

    layers = add_steps(study_tables.quartile_rows(records, ["layer_coupling"], rank))
    layers = layers.sort_values("step")
    layers["line"] = [f"{row.lineage}, step {row.step:.0f}" for row in layers.itertuples()]
    figure = curves(layers, columns=1, title="Coupling of each layer, by step")
    name = command.name_study("checkpoints_layers", records, options.tasks)
    notes += describe_missing(records, ["layer_coupling"])
    command.save(options.out, name, figure, layers, notes)


def describe_without_step(every, records):
    """Name the models without a step in their name, which are left out."""
    others = sorted({*every["model"]} - {*records["model"]})
    listed = ", ".join(others)
    return [f"{len(others)} models left out (no step in their name: {listed})"] if others else []


if __name__ == "__main__":
    command.run(main)
