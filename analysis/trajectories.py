r"""Which path do the tokens of a prompt take through the layers? (Paper, fig. 12.)

    python analysis/trajectories.py OUT --tasks arc_easy --doc 3 --out figures

Draws principal components fitted on the last layer. The runs must have recorded trajectories
(coupling_trajectories=1). Tokens far beyond the others, such as an attention sink, are left out and
named; --skip 0 draws all. A sink usually is the first component: --components 2 3 shows the others.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import selection, study_tables
from coupling_analysis.trajectory_figures import token_trajectories

from lm_eval_coupling.saved.tables import require

COLUMNS = ["trajectories", "trajectory_variance"]
KEYS = [*study_tables.RUN, *study_tables.DOCUMENT]


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--doc", type=int, metavar="N", help="doc_id (default: the first document that has them)")
    add("--skip", type=int, metavar="N", help="leave out the first N tokens, and no others")
    help_components = "principal components (default: 1 2)"
    add("--components", type=int, nargs=2, default=(1, 2), metavar="i", help=help_components)
    options = parser.parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, columns=COLUMNS)
    records = require(records, COLUMNS)
    doc = int(records["doc_id"].iloc[0]) if options.doc is None else options.doc
    drawn = selection.select_document(records, doc)
    drawn = drawn[drawn["task"] == drawn["task"].iloc[0]].drop_duplicates(study_tables.RUN)
    # The number of tokens stands in the name: each model splits a text in its own way.
    by_name = {
        f"{study_tables.label_run(*(record[key] for key in study_tables.RUN))} "
        f"({record['n_tokens']} tokens)": record
        for record in drawn.to_dict("records")
    }
    figure = token_trajectories(
        {name: (r["trajectories"], r["trajectory_variance"]) for name, r in by_name.items()},
        token={name: record["position"] for name, record in by_name.items()},
        skip=options.skip,
        components=tuple(options.components),
        title=f"{drawn['task'].iloc[0]}, document {doc}; thick: the measured token",
    )
    rows = pd.concat([coordinate_rows(record) for record in by_name.values()])
    command.save(options.out, command.name_study("trajectories", drawn), figure, rows)


def coordinate_rows(record: dict) -> pd.DataFrame:
    """Return one row per token and layer."""
    paths = record["trajectories"]
    token, layer = (index.ravel() for index in np.indices(paths.shape[:2]))
    about = {key: record[key] for key in KEYS}
    components = {f"component_{i + 1}": paths[..., i].ravel() for i in range(paths.shape[-1])}
    return pd.DataFrame(about | {"token": token, "layer": layer} | components)


if __name__ == "__main__":
    command.run(main)
