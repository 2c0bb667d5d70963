r"""Coupling matrices |U'ᵀ J V'| of one prompt, for pairs of layers or tokens (figs. 3, 4, 18–23).

    python analysis/coupling_matrices.py MODEL --prompt "The capital is" --layers 1 10 20 30
    python analysis/coupling_matrices.py MODEL --across self --layer 10 --tokens -4 -3 -2 -1

Needs the model, a transformers folder or name: saved records hold no matrices, only their
miscoupling. A row is a Jacobian, a column the singular vectors it is written in.
"""

from __future__ import annotations

import command
from coupling_analysis import prompt_matrices
from coupling_analysis.matrix_figures import coupling_matrices

from lm_eval_coupling.saved.names import short_name

PROMPT = "What is the capital of France? The capital is"


def main(argv=None):
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name for transformers")
    add("--prompt", default=PROMPT, metavar="TEXT")
    add("--rank", type=int, default=10, metavar="K", help="number of singular vectors (10)")
    help_across = "what the Jacobians differ in (%(default)s)"
    add("--across", choices=[*prompt_matrices.ACROSS], default="layers", help=help_across)
    add("--layers", type=int, nargs="+", metavar="l", help="from 1 (default: four, spread evenly)")
    add("--layer", type=int, metavar="l", help="layer for pairs of tokens (default: the middle)")
    help_tokens = "positions; negative counts from the end (-4 -3 -2 -1)"
    add("--tokens", type=int, nargs="+", default=[-4, -3, -2, -1], metavar="t", help=help_tokens)
    add("--untrained", type=int, metavar="SEED", help="draw fresh weights with this seed")
    options = parser.parse_args(argv)
    model = prompt_matrices.load_model(options.model, options.untrained)
    ids = model.encode(options.prompt)
    if options.across == "layers":
        matrices = prompt_matrices.layer_matrices(
            model, ids, options.layers, options.tokens[-1], options.rank
        )
    else:
        matrices = prompt_matrices.token_matrices(
            model, ids, options.layer, options.tokens, options.rank, options.across
        )
    is_trained = options.untrained is None
    title = f"{short_name(options.model)}{'' if is_trained else ', untrained'}: {matrices.about}"
    names = matrices.names
    figure = coupling_matrices(matrices.A, rows=names, columns=names, title=title)
    name = f"coupling_matrices_{options.across}{'' if is_trained else '_untrained'}"
    command.save(options.out, name, figure, matrices.rows())


if __name__ == "__main__":
    command.run(main)
