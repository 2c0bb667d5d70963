r"""Coupling matrices |U'ᵀ J V'| of one prompt, for pairs of layers or of tokens (paper, figs. 3, 4 and 18–23).

    python analysis/coupling_matrices.py MODEL --prompt "What is the capital of France?" --layers 1 10 20 30 --out figures
    python analysis/coupling_matrices.py MODEL --across self --layer 10 --tokens -4 -3 -2 -1 --untrained 0 --out figures

Needs the model, a transformers folder or name: records hold no matrices, only their miscoupling. A row is a Jacobian, a
column the singular vectors it is written in.
"""

from __future__ import annotations

import command
from coupling_analysis import prompt_matrices as matrices
from coupling_analysis.matrix_figures import coupling_matrices as draw

from lm_eval_coupling.saved.names import short_name

PROMPT = "What is the capital of France? The capital is"


def main(argv=None):
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument("model", metavar="MODEL", help="folder or name for transformers")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    parser.add_argument(
        "--rank", type=int, default=10, metavar="K", help="number of singular vectors (%(default)s)"
    )
    parser.add_argument(
        "--across",
        choices=[*matrices.ACROSS],
        default="layers",
        help="what the Jacobians differ in (%(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="l",
        help="from 1 (default: four, spread over the model)",
    )
    parser.add_argument(
        "--layer", type=int, metavar="l", help="where tokens differ (default: the middle one)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[-4, -3, -2, -1],
        metavar="t",
        help="negative: from the end",
    )
    parser.add_argument("--untrained", type=int, metavar="SEED", help="with fresh weights instead")
    options = parser.parse_args(argv)
    model = matrices.load_model(options.model, options.untrained)
    ids = model.encode(options.prompt)
    if options.across == "layers":
        found = matrices.layer_matrices(
            model, ids, options.layers, options.tokens[-1], options.rank
        )
    else:
        found = matrices.token_matrices(
            model, ids, options.layer, options.tokens, options.rank, options.across
        )
    weights = "" if options.untrained is None else ", untrained"
    title = f"{short_name(options.model)}{weights}: {found.about}"
    figure = draw(found.A, rows=found.names, columns=found.names, title=title)
    name = f"coupling_matrices_{options.across}" + (
        "" if options.untrained is None else "_untrained"
    )
    command.save(options.out, name, figure, found.rows())


if __name__ == "__main__":
    command.run(main)
