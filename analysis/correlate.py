"""Does coupling predict the score? The regression of the paper (fig. 7, table 4, fig. 36) for saved runs of many models.

    python analysis/correlate.py RESULTS [RESULTS …] --x coupling@10 --score acc --facts FACTS.csv --out OUT

The same as ``lm-eval-coupling fit``, as a script to start from: what it reads, computes and writes stands below.
"""

from __future__ import annotations

from pathlib import Path

import command

from lm_eval_coupling.fit import output
from lm_eval_coupling.fit.findings import fit_runs


def main(argv=None):
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="OUT",
        help="folders that lm-eval wrote, searched recursively",
    )
    parser.add_argument("--score", metavar="METRIC", help="a metric of lm-eval such as acc_norm")
    parser.add_argument(
        "--x", nargs="+", metavar="PREDICTOR", help="predictors, the one in question first"
    )
    parser.add_argument("--tasks", nargs="+", metavar="T", help="these tasks only; all by default")
    parser.add_argument(
        "--facts",
        type=Path,
        metavar="CSV",
        help="a column model, and family, tuned, training_tokens, …",
    )
    options = parser.parse_args(argv)

    found = fit_runs(
        options.runs, score=options.score, x=options.x, tasks=options.tasks, facts=options.facts
    )
    output.show(found)
    output.save(found, options.out)

    # Every number is in a table, for questions of your own:
    pearson = found.tables["correlations"].query("method == 'pearson'") if found.fits else None
    if pearson is not None:
        strongest = pearson.loc[pearson["coefficient"].abs().idxmax()]
        print(
            f"Strongest of {len(pearson)} correlations, hence by chance too: {strongest.predictor} with {strongest.score}"
        )


if __name__ == "__main__":
    command.run(main)
