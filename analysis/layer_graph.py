r"""Which layers are coupled with which? A graph and a heat map of every run, one panel each (paper, fig. 1c–e).

    python analysis/layer_graph.py OUT [OUT …] --out figures

Several revisions of one model show the graph along training.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import study_tables as tables
from coupling_analysis.graph_figures import edge_weights, layer_graph
from coupling_analysis.missing_documents import left_out

from lm_eval_coupling.figures.heatmaps import layer_heatmaps


def main(argv=None):
    options = command.arguments(__doc__).parse_args(argv)
    records = tables.read(options.runs, options.tasks, measures=["coupling"])
    rank = tables.choose_rank(records, options.rank)
    found = tables.mean_matrices(records, rank)
    panels = {f"{tables.label(*run)} (n = {n})": matrix for run, (matrix, n) in found.items()}
    rows = pd.concat([edges(run, matrix, rank, n) for run, (matrix, n) in found.items()])
    title = f"Coupling of layers, K = {rank}, mean over documents"
    clear = dict(zip(panels, tables.pairs_beyond_chance(records, rank).values(), strict=True))
    pictures = {"layer_graph": layer_graph(panels, rank=rank, clear=clear, title=title)}
    pictures["layer_heatmap"] = layer_heatmaps(panels, rank=rank, title=title)
    for study, figure in pictures.items():
        name = command.of_tasks(study, records, options.tasks)
        command.save(options.out, name, figure, rows, left_out(records, ["coupling"]))


def edges(run: tuple[str, ...], matrix: np.ndarray, rank: int, n: int) -> pd.DataFrame:
    """One row for every ordered pair of layers."""
    jacobian, basis = np.nonzero(~np.eye(len(matrix), dtype=bool))
    about = dict(zip(tables.RUN, run, strict=True)) | {"rank": rank, "n": n}
    columns = {
        "jacobian_layer": jacobian + 1,
        "basis_layer": basis + 1,
        "miscoupling": matrix[jacobian, basis],
    }
    return pd.DataFrame(about | columns | {"edge": edge_weights(matrix, rank)[jacobian, basis]})


if __name__ == "__main__":
    command.run(main)
