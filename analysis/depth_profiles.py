r"""How do norm, straightness, growth, step length and entropy change with depth? (Paper, fig. 26.)

python analysis/depth_profiles.py OUT [OUT …] --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import study_tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import describe_missing

from lm_eval_coupling.measures.registry import readings

PROFILES = ["norms", "step_lengths", "windowed_line_shape", "windowed_expodistance", "entropy"]
SPECTRA = ["effective_rank", "participation_ratio"]  # drawn where they were measured
CHOICES = PROFILES + SPECTRA


def main(argv=None):
    parser = command.build_parser(__doc__)
    parser.add_argument(
        "--measures", nargs="+", choices=CHOICES, metavar="M", help=", ".join(CHOICES)
    )
    options = parser.parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=options.measures or CHOICES)
    rank = study_tables.choose_rank(records, options.rank)
    default = PROFILES + study_tables.recorded_measures(records, SPECTRA)
    measures = options.measures or default
    rows = study_tables.quartile_rows(records, measures, rank)
    log = [readings()[name].label for name in measures if readings()[name].log]
    title = "Trajectories with depth: median and quartiles over documents"
    figure = curves(rows, log=log, title=title)
    name = command.name_study("depth_profiles", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))


if __name__ == "__main__":
    command.run(main)
