r"""How robust are trajectories and coupling to noise on the input embeddings? (Paper, fig. 32.)

    python analysis/noise.py MODEL OUT --prompts 20 --levels 0 0.03 0.1 0.3 1 --out figures

OUT holds saved records: the prompts of this model among them are measured again, with noise added to the input of the first
block.
"""

from __future__ import annotations

import command
from coupling_analysis import prompt_matrices as matrices
from coupling_analysis import study_tables as tables
from coupling_analysis.noise_robustness import LEVELS, noise_robustness
from coupling_analysis.study_figures import noise

from lm_eval_coupling.measures.formulas.headline import chance_coupling

PANELS = {
    "cosine_first": "cosine with the clean stream, block 1",
    "cosine_last": "cosine with the clean stream, last block",
    "coupling": "coupling",
}


def main(argv=None):
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument("model", metavar="MODEL", help="folder or name for transformers")
    parser.add_argument(
        "runs", nargs="+", metavar="OUT", help="folders that lm-eval wrote, for their prompts"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=20,
        metavar="N",
        help="the first so many distinct ones (%(default)s)",
    )
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=LEVELS,
        metavar="X",
        help="over the embeddings' norm",
    )
    parser.add_argument(
        "--rank", type=int, default=10, metavar="K", help="number of singular vectors (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args(argv)
    records = tables.of_model(tables.read(options.runs, columns=["tokens"]), options.model)
    name = records["model"].iloc[0]
    prompts = list(dict.fromkeys(records["tokens"]))[: options.prompts]
    model = matrices.load_model(options.model)
    rows = noise_robustness(model, prompts, options.levels, rank=options.rank, seed=options.seed)
    long = rows.melt(["prompt", "level"], list(PANELS), "measure")
    found = tables.summary(long, ["measure", "level"])
    found = found.assign(
        panel=found["measure"].map(PANELS), line=f"{name}, K = {options.rank}", weights="trained"
    )
    found["chance"] = (
        found["measure"]
        .eq("coupling")
        .map({True: chance_coupling(options.rank), False: float("nan")})
    )
    figure = noise(found, title=f"{name}: noise on the input embeddings of {len(prompts)} prompts")
    drawn = records[records["tokens"].isin(prompts)]
    command.save(options.out, command.of_tasks("noise", drawn), figure, rows)
    print(found[["measure", "level", "median", "q25", "q75", "n"]].to_string(index=False))


if __name__ == "__main__":
    command.run(main)
