r"""How do norm, straightness, growth, step length and entropy go with depth? Quartiles over documents (paper, fig. 26).

python analysis/depth_profiles.py OUT [OUT …] --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables as tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import left_out

from lm_eval_coupling.measures.registry import readings

PROFILES = ["norms", "step_lengths", "windowed_line_shape", "windowed_expodistance", "entropy"]
SPECTRA = ["effective_rank", "participation_ratio"]  # where these were measured, too


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=[*PROFILES, *SPECTRA],
        metavar="M",
        help=", ".join(PROFILES + SPECTRA),
    )
    options = parser.parse_args(argv)
    records = tables.read(
        options.runs, options.tasks, measures=options.measures or PROFILES + SPECTRA
    )
    rank = tables.choose_rank(records, options.rank)
    measures = options.measures or PROFILES + tables.recorded(records, SPECTRA)
    rows = tables.named(tables.quartiles(tables.long(records, measures, rank), tables.RUN), rank)
    log = [readings()[name].label for name in measures if readings()[name].log]
    title = "Trajectories with depth: median and quartiles over documents"
    name = command.of_tasks("depth_profiles", records, options.tasks)
    command.save(
        options.out, name, curves(rows, log=log, title=title), rows, left_out(records, measures)
    )


if __name__ == "__main__":
    command.run(main)
