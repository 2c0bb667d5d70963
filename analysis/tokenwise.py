r"""Are the Jacobians of different tokens coupled? Self-coupling and context coupling (paper, figs. 18–23).

    python analysis/tokenwise.py OUT --kind self --out figures
    python analysis/tokenwise.py OUT --kind context_input --doc 3 --out figures

The runs must have measured it: coupling_measures=depth+regularity+self+context,coupling_tokens=last8. The coupling
matrices themselves draws coupling_matrices.py.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import study_tables as tables
from coupling_analysis import token_pairs as tokens
from coupling_analysis.matrix_figures import token_heatmaps
from coupling_analysis.missing_documents import left_out

from lm_eval_coupling.saved.tables import require

PANELS = 4  # layers, spread over those measured


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument("--kind", choices=[*tokens.KINDS], default="self")
    parser.add_argument(
        "--doc", type=int, metavar="N", help="of the document with this doc_id only, not the mean"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="l",
        help=f"to draw, from 1 (default: {PANELS} of those measured)",
    )
    options = parser.parse_args(argv)
    kind = tokens.KINDS[options.kind]
    records = tables.read(
        options.runs, options.tasks, columns=[kind.column, kind.tokens, kind.layers]
    )
    missing = left_out(records, columns=[kind.column]) if options.doc is None else []
    records = require(records, [kind.column])
    rank = tables.choose_rank(records, options.rank)
    records = tables.of_document(records, options.doc)
    panels, places, rows = {}, {}, []
    for run, of in records.groupby(tables.RUN, sort=False):
        found = tokens.token_pairs(of, options.kind, rank)
        for layer in tables.chosen(options.layers, found.layers, PANELS):
            at = found.layers.index(layer)
            name = f"{tables.label(*run)}, layer {layer} (n = {found.n})"
            panels[name], places[name] = found.miscoupling[at, at], found.tokens
        rows.append(found.rows().assign(**dict(zip(tables.RUN, run, strict=True))))
        pairs = found.by_layers()
        every, within = 1 - np.nanmean(pairs), 1 - np.nanmean(np.diag(pairs))
        print(
            f"{tables.label(*run)}: {kind.label}: {every:.4f} over different tokens, within a layer {within:.4f}"
        )
    title = f"{kind.label}, K = {rank}: miscoupling of tokens within a layer"
    figure = token_heatmaps(panels, tokens=places, rank=rank, title=title)
    name = command.of_tasks(f"tokenwise_{options.kind}", records, options.tasks)
    command.save(options.out, name, figure, pd.concat(rows), missing)


if __name__ == "__main__":
    command.run(main)
