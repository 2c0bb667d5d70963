"""Numbers that a terminal shows of saved runs: coupling and score, one row per run, task and K."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.saved.names import full_names, label_rows
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.saved_table import SavedTable, passing_over
from lm_eval_coupling.saved.task_rows import rows_of_run
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values, ranks_of
from lm_eval_coupling.statistics.estimates import Estimate


def overview(tables: Sequence[tuple[SavedRun, SavedTable]], problems: list[str]) -> pd.DataFrame:
    """Return one row per table and rank: means over documents with their standard errors.

    Args:
        tables: with their runs.
        problems: a sentence on each table that cannot be read is added.

    Returns:
        Empty if no table can be read. Columns:

        * ``label`` (of the run), ``folder, model, revision, variant, fingerprint, prompting,
          task``;
        * ``metric, score, score_stderr, scored``: the metric that lm-eval lists first, and the
          documents behind it;
        * ``rank, documents, coupling, coupling_stderr, chance, excess``;
        * ``untrained, untrained_stderr``, and the trained less the untrained weights over the
          documents of both, see :func:`paired_difference`; ``seed`` of the untrained weights;
        * every other number of a prompt by its name, with its ``_stderr``;
        * ``worst_certificate, missing`` (in words); ``file`` of the table.
    """
    scores: dict[int, dict[str, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for run, table in tables:
        if id(run) not in scores:
            tasks = rows_of_run(run) if run.file else ()
            scores[id(run)] = {row["task"]: main_score(row) for row in tasks}
        with passing_over(problems):
            score = scores[id(run)].get(table.task, {})
            rows += [row | {"file": str(table.file)} for row in _rows(run, table, score)]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    return frame.assign(label=label_rows(frame, full_names(frame["model"].unique())))


def main_score(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score that lm-eval lists first, from a row of one task."""
    metric = row["metric"]
    return {
        "metric": metric,
        "score": row.get(metric, math.nan),
        "score_stderr": row.get(metric and metric.replace(",", "_stderr,", 1), math.nan),
        "scored": row["n_samples"],
    }


def _rows(run: SavedRun, table: SavedTable, score: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    values = prompt_values(table, "all")
    trained, untrained = (values[values["weights"] == of] for of in ("trained", "untrained"))
    about: dict[str, Any] = {
        "folder": str(table.file.parent),
        "model": run.model,
        "revision": run.revision,
        "variant": run.variant,
        "fingerprint": run.fingerprint,
        "prompting": run.prompting(table.task),
        "task": table.task,
    } | dict(score)
    own = document_values(trained)
    # Averages of nothing take as long as others, and most tables have no twin.
    twin = document_values(untrained) if len(untrained) else pd.DataFrame()
    others: dict[str, Any] = {}
    for name in [name for name in own if "@" not in name]:
        others[name], others[f"{name}_stderr"], _ = mean_and_error(own[name])
    others |= {
        "worst_certificate": trained["worst_certificate"].max(),
        "missing": _describe_missing(trained),
        "seed": (table.about.get("untrained") or {}).get("seed"),
    }
    ranks: Sequence[int | None] = ranks_of(trained) or [None]
    for rank in ranks:
        yield about | _coupling(own, twin, rank) | others


def _coupling(trained: pd.DataFrame, untrained: pd.DataFrame, rank: int | None) -> dict[str, Any]:
    name, none = f"coupling@{rank}", pd.Series(dtype=float)
    own, twin = (v[name].dropna() if name in v else none for v in (trained, untrained))
    mean, error, n = mean_and_error(own)
    twin_mean, twin_error, _ = mean_and_error(twin)
    chance = math.nan if rank is None else chance_coupling(rank)
    return {
        "rank": rank,
        "documents": n,
        "coupling": mean,
        "coupling_stderr": error,
        "chance": chance,
        "excess": mean - chance,
        "untrained": twin_mean,
        "untrained_stderr": twin_error,
    } | paired_difference(own, twin)


def paired_difference(first: pd.Series, second: pd.Series) -> dict[str, float | int]:
    """Return ``difference``, first less second, over the ``paired`` documents of both.

    With it come ``difference_stderr`` and Student's 95 % interval, ``difference_low`` and
    ``difference_high``.
    """
    has_both = len(first) and len(second)
    mean, error, n = mean_and_error(first - second) if has_both else (math.nan, math.nan, 0)
    estimate = Estimate.from_t(mean, error, max(n - 1, 1), 0.95)
    return {
        "paired": n,
        "difference": mean,
        "difference_stderr": error,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
    }


def _describe_missing(values: pd.DataFrame) -> str:
    """Count the prompts that were not measured, by reason."""
    names = [f"coupling@{rank}" for rank in ranks_of(values)]
    missing = values[values[names].isna().all(axis=1)] if names else values
    reasons = Counter(reason or "not asked for" for reason in missing["reason"])
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
