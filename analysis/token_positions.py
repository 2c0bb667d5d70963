r"""Does coupling depend on the position of the token? (No figure of the paper.)

    lm_eval --model coupling-hf --tasks arc_easy --output_path OUT --model_args \\
        pretrained=MODEL,coupling_position=0+1+2+4+8+16+-1,coupling_measures=depth+controls
    python analysis/token_positions.py OUT [OUT …] --out figures

Draws coupling and its parts over the number of the measured token, from 1. The first token is the
attention sink of most models. The last token of every prompt stands at their median length.
"""

from __future__ import annotations

import command
import pandas as pd
from coupling_analysis import study_tables
from coupling_analysis.line_figures import curves
from coupling_analysis.missing_documents import describe_missing

PARTS = ["coupling", "rotated", "deflated", "without_identity", "one_pair", "erasing"]
PRINTED = ["line", "weights", "token", "measure", "mean", "stderr", "n"]


def quartiles_by_token(records: pd.DataFrame, measures: list[str], rank: int) -> pd.DataFrame:
    """Return quartiles over documents, a row for each run, measure and measured token.

    Args:
        records: One row per document and measured token.
        measures: Readings that are one number of a token.
        rank: Number of singular vectors.

    Returns:
        ``token`` is the number of the token as a text, or "last"; ``x`` its place in the picture.
        The last token of a prompt is no other token as well.
    """
    is_last = records["position"] == records["n_tokens"] - 1
    number = (records["position"] + 1).where(~is_last, 0)
    tables = []
    for token, of in records.groupby(number):
        rows = study_tables.quartile_rows(of, measures, rank)
        place = {"token": str(token), "x": token}
        if token == 0:
            place = {"token": "last", "x": of["n_tokens"].median()}
        tables.append(rows.assign(**place))
    return pd.concat(tables, ignore_index=True)


def main(argv=None):
    options = command.build_parser(__doc__).parse_args(argv)
    records = study_tables.read(options.runs, options.tasks, measures=PARTS, places="all")
    rank = study_tables.choose_rank(records, options.rank)
    measures = study_tables.recorded_measures(records, PARTS, required=1)
    rows = quartiles_by_token(records, measures, rank)
    title = f"By position, K = {rank}: medians and quartiles over documents"
    figure = curves(rows, x="x", x_label="token, from 1", log_x=True, title=title)
    name = command.name_study("token_positions", records, options.tasks)
    command.save(options.out, name, figure, rows, describe_missing(records, measures))
    command.print_table(rows[PRINTED])


if __name__ == "__main__":
    command.run(main)
