"""Does coupling predict the score? The paper's regression for saved runs (figs. 7 and 36, table 4).

    python analysis/correlate.py RESULTS --x coupling@10 --score acc --facts FACTS.csv --out OUT

Does the same as ``lm-eval-coupling fit``, as a script to start from.
"""

from __future__ import annotations

from pathlib import Path

import command

from lm_eval_coupling.fit import output
from lm_eval_coupling.fit.findings import fit_runs


def main(argv=None):
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    help_runs = "folders that lm-eval wrote, searched recursively"
    add("runs", type=Path, nargs="+", metavar="OUT", help=help_runs)
    add("--score", metavar="METRIC", help="a metric of lm-eval such as acc_norm")
    add("--x", nargs="+", metavar="PREDICTOR", help="predictors, the main one first")
    add("--tasks", nargs="+", metavar="T", help="these tasks only (default: all)")
    help_facts = "a column model, and family, tuned, training_tokens, …"
    add("--facts", type=Path, metavar="CSV", help=help_facts)
    options = parser.parse_args(argv)

    findings = fit_runs(
        options.runs, score=options.score, x=options.x, tasks=options.tasks, facts=options.facts
    )
    output.show(findings)
    output.save(findings, options.out)

    # Every number is in a table, ready for further questions:
    if findings.fits:
        pearson = findings.tables["correlations"].query("method == 'pearson'")
        strongest = pearson.loc[pearson["coefficient"].abs().idxmax()]
        command.say(
            f"Strongest of {len(pearson)} correlations, hence by chance too: "
            f"{strongest.predictor} with {strongest.score}"
        )


if __name__ == "__main__":
    command.run(main)
