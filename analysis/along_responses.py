r"""Does coupling change along what a model writes? By position, right and wrong answers apart.

lm_eval --model coupling-hf --model_args pretrained=MODEL,coupling_position=generated-spread16 \
    --tasks gsm8k_cot_zeroshot --log_samples --output_path OUT
python analysis/along_responses.py OUT --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import along_responses, study_tables
from coupling_analysis.line_figures import curves

MEASURES = ["coupling", "line_shape_score"]


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--score", metavar="KEY", help="metric of right and wrong, such as exact_match,none")
    add("--bins", type=int, default=8, metavar="N", help="bins along the response (%(default)s)")
    options = parser.parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=MEASURES)
    rank = study_tables.choose_rank(records, options.rank)
    rows = along_responses.read_along(
        options.runs, MEASURES, tasks=options.tasks, rank=rank, score=options.score
    )
    means = study_tables.named(along_responses.curves_along(rows, options.bins), rank)
    means["line"] = [f"{r.line}, {r.kind}, {r.answer}" for r in means.itertuples()]
    drawn = means.rename(columns={"mean": "median", "low": "q25", "high": "q75"})
    figure = curves(
        drawn.assign(undefined=0),
        x="share",
        x_label="position in the response, 0 first token, 1 last",
        columns=2,
        title=f"Along the response, K = {rank}: mean over documents with its 95 % interval",
    )
    name = command.name_study("along_responses", records, options.tasks)
    command.save(options.out, name, figure, means)
    slopes = along_responses.slopes_along(rows)
    command.save_table(options.out, f"{name}_slopes", slopes)
    command.save_table(options.out, f"{name}_tokens", rows)
    shown = ["model", "task", "kind", "answer", "measure", "n", "level", "slope"]
    command.print_table(slopes[[*shown, "slope_low", "slope_high"]])


if __name__ == "__main__":
    command.run(main)
