r"""Which layers are coupled with which? A graph and a heat map of every run (paper, fig. 1c–e).

    python analysis/layer_graph.py OUT [OUT …] --out figures

Several revisions of one model show the graph along training.
"""

from __future__ import annotations

import command
import numpy as np
import pandas as pd
from coupling_analysis import study_tables
from coupling_analysis.graph_figures import edge_weights, layer_graph
from coupling_analysis.missing_documents import describe_missing

from lm_eval_coupling.figures.heatmaps import layer_heatmaps


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=["coupling"])
    rank = study_tables.choose_rank(records, options.rank)
    matrices = study_tables.mean_matrices(records, rank)
    panels = {
        f"{study_tables.label_run(*run)} (n = {n})": matrix for run, (matrix, n) in matrices.items()
    }
    rows = pd.concat([edge_rows(run, matrix, rank, n) for run, (matrix, n) in matrices.items()])
    clear_pairs = study_tables.pairs_beyond_chance(records, rank)
    clear = dict(zip(panels, clear_pairs.values(), strict=True))
    title = f"Coupling of layers, K = {rank}, mean over documents"
    figures = {
        "layer_graph": layer_graph(panels, rank=rank, clear=clear, title=title),
        "layer_heatmap": layer_heatmaps(panels, rank=rank, title=title),
    }
    for study, figure in figures.items():
        name = command.name_study(study, records, options.tasks)
        command.save(options.out, name, figure, rows, describe_missing(records, ["coupling"]))


def edge_rows(run: tuple[str, ...], matrix: np.ndarray, rank: int, n: int) -> pd.DataFrame:
    """Return one row per ordered pair of layers."""
    jacobian, basis = np.nonzero(~np.eye(len(matrix), dtype=bool))
    about = dict(zip(study_tables.RUN, run, strict=True)) | {"rank": rank, "n": n}
    columns = {
        "jacobian_layer": jacobian + 1,
        "basis_layer": basis + 1,
        "miscoupling": matrix[jacobian, basis],
        "edge": edge_weights(matrix, rank)[jacobian, basis],
    }
    return pd.DataFrame(about | columns)


if __name__ == "__main__":
    command.run(main)
