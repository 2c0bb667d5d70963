r"""Which way do the tokens of a prompt take through the layers? PCA fitted on the last layer (paper, fig. 12).

    python analysis/trajectories.py OUT --tasks arc_easy --doc 3 --out figures

The runs must have recorded trajectories (coupling_trajectories=1). Where the first token is an attention sink, it is the
first component: --skip 1 --components 2 3 shows the others.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import study_tables as tables
from coupling_analysis.trajectory_figures import trajectories as draw

from lm_eval_coupling.saved.tables import require


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--doc",
        type=int,
        metavar="N",
        help="doc_id; by default of the first document that has them",
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N tokens (an attention sink)",
    )
    parser.add_argument(
        "--components",
        type=int,
        nargs=2,
        default=(1, 2),
        metavar="i",
        help="of the PCA (default: 1 2)",
    )
    options = parser.parse_args(argv)
    columns = ["trajectories", "trajectory_variance"]
    records = require(tables.read(options.runs, options.tasks, columns=columns), columns)
    doc = int(records["doc_id"].iloc[0]) if options.doc is None else options.doc
    chosen = tables.of_document(records, doc)
    chosen = chosen[chosen["task"] == chosen["task"].iloc[0]].drop_duplicates(tables.RUN)
    of = {  # models split a text into tokens each in its way
        f"{tables.label(*(record[key] for key in tables.RUN))} ({record['n_tokens']} tokens)": record
        for record in chosen.to_dict("records")
    }
    prompts = {
        name: (record["trajectories"], record["trajectory_variance"]) for name, record in of.items()
    }
    measured = {name: record["position"] for name, record in of.items()}
    title = f"{chosen['task'].iloc[0]}, document {doc}; thick: the measured token"
    rows = pd.concat([coordinates(record) for record in of.values()])
    components = tuple(options.components)
    figure = draw(prompts, token=measured, skip=options.skip, components=components, title=title)
    command.save(options.out, command.of_tasks("trajectories", chosen), figure, rows)


def coordinates(record: dict) -> pd.DataFrame:
    """One row for every token and layer."""
    ways = record["trajectories"]
    token, layer = (index.ravel() for index in np.indices(ways.shape[:2]))
    about = {key: record[key] for key in (*tables.RUN, *tables.DOCUMENT)} | {
        "token": token,
        "layer": layer,
    }
    return pd.DataFrame(
        about | {f"component_{i + 1}": ways[..., i].ravel() for i in range(ways.shape[-1])}
    )


if __name__ == "__main__":
    command.run(main)
