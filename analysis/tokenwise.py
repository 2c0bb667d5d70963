r"""Are the Jacobians of different tokens coupled? Self- and context coupling (paper, figs. 18–23).

    python analysis/tokenwise.py OUT --kind self --out figures
    python analysis/tokenwise.py OUT --kind context_input --doc 3 --out figures

The runs must have measured it:
coupling_measures=depth+regularity+self+context,coupling_tokens=last8. The coupling matrices
themselves are drawn by coupling_matrices.py.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import selection, study_tables
from coupling_analysis.matrix_figures import token_heatmaps
from coupling_analysis.missing_documents import describe_missing
from coupling_analysis.token_pairs import KINDS, mean_token_pairs

from lm_eval_coupling.saved.tables import require

PANELS = 4  # layers, spread evenly over the measured ones
# Chance takes the two bases for unrelated; those of one layer's tokens share its weights.
BASELINE = (
    "Baseline: the untrained twin, not chance. Jacobians of one layer share its weights, so that "
    "tokens are coupled without any training."
)


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--kind", choices=[*KINDS], default="self")
    add("--doc", type=int, metavar="N", help="one document, by its doc_id, not the mean of all")
    help_layers = f"layers to draw, from 1 (default: {PANELS} of the measured ones)"
    add("--layers", type=int, nargs="+", metavar="l", help=help_layers)
    options = parser.parse_args(argv)
    kind = KINDS[options.kind]
    columns = [kind.column, kind.tokens, kind.layers]
    records = study_tables.read(options.runs, options.tasks, columns=columns)
    notes = describe_missing(records, columns=[kind.column]) if options.doc is None else []
    records = require(records, [kind.column])
    rank = study_tables.choose_rank(records, options.rank)
    records = selection.select_document(records, options.doc)
    panels, tokens, rows = {}, {}, []
    for run, of in records.groupby(study_tables.RUN, sort=False):
        label = study_tables.label_run(*run)
        pairs = mean_token_pairs(of, options.kind, rank)
        for layer in selection.choose_layers(options.layers, pairs.layers, PANELS):
            at = pairs.layers.index(layer)
            name = f"{label}, layer {layer} (n = {pairs.n})"
            panels[name], tokens[name] = pairs.miscoupling[at, at], pairs.tokens
        rows.append(pairs.rows().assign(**dict(zip(study_tables.RUN, run, strict=True))))
        means = 1 - pairs.by_layers()
        command.say(
            f"{label}: {kind.label}: {np.nanmean(means):.4f} over different tokens, within a layer "
            f"{np.nanmean(np.diag(means)):.4f}"
        )
    title = f"{kind.label}, K = {rank}: coupling of tokens within a layer"
    figure = token_heatmaps(panels, tokens=tokens, rank=rank, title=title, note=BASELINE)
    name = command.name_study(f"tokenwise_{options.kind}", records, options.tasks)
    command.save(options.out, name, figure, pd.concat(rows), notes)


if __name__ == "__main__":
    command.run(main)
