"""Measures along what a model wrote: by position in the response, right and wrong answers apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import RUN
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.report.response_curves import ANSWERS
from lm_eval_coupling.saved.names import label_weights
from lm_eval_coupling.saved.records import read_table
from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun, find_runs
from lm_eval_coupling.saved.task_rows import is_score
from lm_eval_coupling.statistics import Estimate

_GROUP = [*RUN, "task", "kind", "answer", "measure"]


def read_along(
    paths: Iterable[Path | str],
    measures: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    rank: int = 10,
    score: str | None = None,
) -> pd.DataFrame:
    """Read every measured token of responses, with whether the answer was right.

    Args:
        paths: folders that lm-eval wrote, with ``coupling_position=generated-spread8`` or the like.
        measures: readings that are one number of a token.
        tasks: these tasks only.
        rank: number of singular vectors.
        score: lm-eval's key of the metric that tells right from wrong, such as
            ``exact_match,flexible-extract``; by default the first of each task.

    Returns:
        One row per token and measure: ``model, revision, weights, task, kind, doc_hash, answer``
        (`ANSWERS`), ``part_index, part_length, share`` (0 at the first token of the part, 1 at the
        last), ``measure`` and ``value``.

    Raises:
        CouplingError: if no token of a response was measured.
    """
    rows = []
    tables = find_runs(list(paths)).newest_tables()
    models = pd.DataFrame([{"model": run.model, "variant": run.variant} for run, _ in tables])
    for name, (run, table) in zip(label_weights(models), tables, strict=True):
        if (tasks and table.task not in tasks) or "part_index" not in table.columns:
            continue
        tokens = read_table(run, table, weights="all", places="all").dropna(subset="part_index")
        tokens["model"] = name
        answers = answers_of_run(run, table.task, _metric(run, table.task, score), [])
        for token in tokens.to_dict("records"):
            right = answers.get(token["doc_hash"], {}).get("right")
            last = max(token["part_length"] - 1, 1)
            about = {column: token[column] for column in (*RUN, "task", "kind", "doc_hash")} | {
                "answer": ANSWERS[right],
                "part_index": token["part_index"],
                "part_length": token["part_length"],
                "share": token["part_index"] / last,
            }
            rows += [
                about | {"measure": measure, "value": float(readings()[measure].read(token, rank))}
                for measure in measures
                if token.get(readings()[measure].column) is not None
            ]
    if not rows:
        raise CouplingError(
            "got no measured token of a response, expected some; measure with "
            "coupling_position=generated-spread8"
        )
    return pd.DataFrame(rows)


def _metric(run: SavedRun, task: str, score: str | None) -> str | None:
    names = [n for n in run.results.get("results", {}).get(task, {}) if is_score(n)]
    return score if score in names else next(iter(names), None)


def curves_along(rows: pd.DataFrame, bins: int = 8, confidence: float = 0.95) -> pd.DataFrame:
    """Average over documents in bins of the position, with Student's interval.

    A document counts once in a bin, by the mean of its tokens there.

    Args:
        rows: from :func:`read_along`.
        bins: of equal width, from the first token of the part to the last.
        confidence: of the intervals.

    Returns:
        One row per run, task, kind, answer, measure and bin: its middle as ``share``, ``mean, low,
        high``, and the number of documents ``n``.
    """
    places = np.minimum((rows["share"] * bins).astype(int), bins - 1)
    by_document = rows.assign(bin=places).groupby([*_GROUP, "bin", "doc_hash"], sort=False)
    values = by_document["value"].mean().reset_index()
    summaries = []
    for key, of in values.groupby([*_GROUP, "bin"], sort=False):
        estimate, n = _mean(of["value"], confidence)
        about = dict(zip([*_GROUP, "bin"], key, strict=True))
        place = (about.pop("bin") + 0.5) / bins
        summaries.append(
            about
            | {"share": place, "mean": estimate.value, "low": estimate.low, "high": estimate.high}
            | {"n": n}
        )
    return pd.DataFrame(summaries)


def slopes_along(rows: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Summarize level and slope over the documents of each group.

    The slope of a document is that of least squares over its tokens, from the first to the last
    token of the part. Documents with fewer than three measured tokens have none.

    Returns:
        One row per run, task, kind, answer and measure: ``level`` (mean over the tokens) and
        ``slope`` with ``_low`` and ``_high``, and the number of documents ``n``.
    """
    documents = [
        dict(zip([*_GROUP, "doc_hash"], key, strict=True))
        | {"level": of["value"].mean(), "slope": _slope(of["share"], of["value"])}
        for key, of in rows.groupby([*_GROUP, "doc_hash"], sort=False)
    ]
    summaries = []
    for key, of in pd.DataFrame(documents).groupby(_GROUP, sort=False):
        row = dict(zip(_GROUP, key, strict=True)) | {"n": len(of)}
        for name in ("level", "slope"):
            estimate, _ = _mean(of[name], confidence)
            row |= {name: estimate.value, f"{name}_low": estimate.low}
            row |= {f"{name}_high": estimate.high}
        summaries.append(row)
    return pd.DataFrame(summaries)


def _slope(x: pd.Series, y: pd.Series) -> float:
    defined = y.notna()
    x, y = x[defined], y[defined]
    if x.nunique() < 3:
        return math.nan
    return float(np.polyfit(x, y, 1)[0])


def _mean(values: pd.Series, confidence: float) -> tuple[Estimate, int]:
    defined = values.dropna()
    n = len(defined)
    stderr = defined.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate.from_t(defined.mean(), stderr, max(n - 1, 1), confidence), n
