r"""How robust are trajectories and coupling to noise on the input embeddings? (Paper, fig. 32.)

    python analysis/noise.py MODEL OUT --prompts 20 --levels 0 0.03 0.1 0.3 1 --out figures

Prompts of this model among the saved records in OUT are measured again, with noise added to the
input of the first block.
"""

from __future__ import annotations

import math

import command
from coupling_analysis import prompt_matrices, selection, study_tables
from coupling_analysis.noise_robustness import LEVELS, noise_robustness
from coupling_analysis.study_figures import noise_curves

from lm_eval_coupling.measures.formulas.headline import chance_coupling

PANELS = {
    "cosine_first": "cosine with the clean stream, block 1",
    "cosine_last": "cosine with the clean stream, last block",
    "coupling": "coupling",
}
PRINTED = ["measure", "level", "median", "q25", "q75", "n"]


def main(argv=None):
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name for transformers")
    add("runs", nargs="+", metavar="OUT", help="folders that lm-eval wrote, for their prompts")
    add("--prompts", type=int, default=20, metavar="N", help="the first N distinct prompts (20)")
    help_levels = "norms of the noise, relative to the embeddings'"
    add("--levels", type=float, nargs="+", default=LEVELS, metavar="X", help=help_levels)
    add("--rank", type=int, default=10, metavar="K", help="number of singular vectors (10)")
    add("--seed", type=int, default=0, help="seed of the noise (0)")
    options = parser.parse_args(argv)
    every = study_tables.read(options.runs, columns=["tokens"])
    records = selection.select_model(every, options.model)
    model_name = records["model"].iloc[0]
    prompts = list(dict.fromkeys(records["tokens"]))[: options.prompts]
    model = prompt_matrices.load_model(options.model)
    rows = noise_robustness(model, prompts, options.levels, rank=options.rank, seed=options.seed)
    values = rows.melt(["prompt", "level"], list(PANELS), "measure")
    summary = study_tables.summarize(values, ["measure", "level"])
    chances = {"coupling": chance_coupling(options.rank)}
    summary = summary.assign(
        panel=summary["measure"].map(PANELS),
        chance=[chances.get(measure, math.nan) for measure in summary["measure"]],
        line=f"{model_name}, K = {options.rank}",
        weights="trained",
    )
    title = f"{model_name}: noise on the input embeddings of {len(prompts)} prompts"
    drawn = records[records["tokens"].isin(prompts)]
    name = command.name_study("noise", drawn)
    command.save(options.out, name, noise_curves(summary, title=title), rows)
    command.print_table(summary[PRINTED])


if __name__ == "__main__":
    command.run(main)
