"""What a picture does not show: how many documents, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from coupling_analysis.study_tables import DOCUMENT, RUN
from lm_eval_coupling.measures.registry import readings


def left_out(
    records: pd.DataFrame, measures: Sequence[str] = (), columns: Sequence[str] = ()
) -> list[str]:
    """How many documents lack what is drawn, and why.

    A document counts once for every model and weights of which none of its prompts has the number.

    Args:
        records: of :func:`~coupling_analysis.study_tables.read`, before any of them were dropped.
        measures: readings that are drawn.
        columns: columns that are drawn.

    Returns:
        A sentence for all measures alike, or one each; none if all documents have it.
    """
    wanted = {readings()[name].label: readings()[name].column for name in measures} | {
        name: name for name in columns
    }
    told: dict[str, list[str]] = {}
    for label, column in wanted.items():
        if words := _counted(
            records,
            records[column].notna() if column in records else pd.Series(False, records.index),
        ):
            told.setdefault(words, []).append(label)
    return [
        words if len(labels) == len(wanted) else f"{', '.join(labels)}: {words}"
        for words, labels in told.items()
    ]


def without(rows: pd.DataFrame, kept: pd.DataFrame, name: str) -> list[str]:
    """How many documents of ``rows`` are not ``kept``, because their ``name`` is missing or the same in all."""
    every, drawn = (
        frame.groupby("task", sort=False)["doc_hash"].nunique() for frame in (rows, kept)
    )
    drawn = drawn.reindex(every.index, fill_value=0)
    reasons = {
        task: f"without {name!r}" if drawn[task] else f"no two with a different {name!r}"
        for task in every.index
    }
    return [
        f"{task}: {every[task] - drawn[task]} of {every[task]} documents left out ({reasons[task]})"
        for task in every.index
        if drawn[task] < every[task]
    ]


def alone(rows: pd.DataFrame, first: str, second: str) -> list[str]:
    """How many documents only one of two tasks has, which make no pair."""
    one, other = (set(rows.loc[rows["task"] == task, "doc_hash"]) for task in (first, second))
    pairs = {f"only in {first}": len(one - other), f"only in {second}": len(other - one)}
    told = [f"{count} {where}" for where, count in pairs.items() if count]
    return (
        [f"{sum(pairs.values())} of {len(one | other)} documents left out ({', '.join(told)})"]
        if told
        else []
    )


def too_short(records: pd.DataFrame, last: int) -> list[str]:
    """How many documents have no prompt of more than ``last`` tokens up to the measured one."""
    longest = records.groupby([*RUN, *DOCUMENT], sort=False, dropna=False)["position"].max()
    short = int((longest < last).sum())
    return (
        [
            f"{short} of {len(longest)} documents left out (at most {last} tokens up to the measured one)"
        ]
        if short
        else []
    )


def _counted(records: pd.DataFrame, known: pd.Series) -> str:
    documents = records.assign(known=known).groupby([*RUN, *DOCUMENT], sort=False, dropna=False)
    found = documents["known"].any()
    if found.all():
        return ""
    reasons = Counter(
        documents["reason"].first()[~found].map(lambda reason: reason or "not measured")
    )
    counts = [
        words if len(reasons) == 1 else f"{count} × {words}"
        for words, count in reasons.most_common()
    ]
    return f"{(~found).sum()} of {len(found)} documents left out ({'; '.join(counts)})"
