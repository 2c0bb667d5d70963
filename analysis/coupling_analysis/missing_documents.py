"""Sentences below a picture: which documents it lacks and why, and which runs have other tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from coupling_analysis.study_tables import DOCUMENT, RUN, label_run
from lm_eval_coupling.measures.registry import readings

_MOST_TASKS = 3  # that a sentence names


def describe_missing(
    records: pd.DataFrame, measures: Sequence[str] = (), columns: Sequence[str] = ()
) -> list[str]:
    """Count the documents that lack a drawn number, and name runs with other tasks.

    A document counts once for each model and weights where one of its prompts lacks the number.

    Args:
        records: from :func:`~coupling_analysis.study_tables.read`, none dropped since.
        measures: readings that are drawn.
        columns: columns that are drawn.

    Returns:
        Sentences, none if nothing is missing: one per number unless it fits all, and one about
        the tasks.
    """
    drawn = {readings()[name].label: readings()[name].column for name in measures}
    drawn |= {name: name for name in columns}
    labels: dict[str, list[str]] = {}
    for label, column in drawn.items():
        absent = pd.Series(False, records.index)
        is_known = records[column].notna() if column in records else absent
        if sentence := _count_unknown(records, is_known):
            labels.setdefault(sentence, []).append(label)
    sentences = [
        sentence if len(of) == len(drawn) else f"{', '.join(of)}: {sentence}"
        for sentence, of in labels.items()
    ]
    return sentences + _describe_task_sets(records)


def _describe_task_sets(records: pd.DataFrame) -> list[str]:
    """Name the tasks of each run, unless all runs have the same."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for run, of in records.groupby(RUN, sort=False, dropna=False):
        runs.setdefault(tuple(sorted(of["task"].unique())), []).append(label_run(*run))
    if len(runs) < 2:
        return []
    parts = [
        f"{', '.join(tasks) if len(tasks) <= _MOST_TASKS else f'{len(tasks)} tasks'} "
        f"({', '.join(names)})"
        for tasks, names in runs.items()
    ]
    return [f"not the same tasks in all: {'; '.join(parts)}"]


def _count_unknown(records: pd.DataFrame, is_known: pd.Series) -> str:
    keys = [*RUN, *DOCUMENT]
    documents = records.assign(known=is_known).groupby(keys, sort=False, dropna=False)
    has_number = documents["known"].all()
    if has_number.all():
        return ""
    reasons = Counter(
        reason or "not measured" for reason in documents["reason"].first()[~has_number]
    )
    counts = [
        reason if len(reasons) == 1 else f"{count} × {reason}"
        for reason, count in reasons.most_common()
    ]
    return f"{(~has_number).sum()} of {len(has_number)} documents left out ({'; '.join(counts)})"


def describe_without_number(rows: pd.DataFrame, drawn: pd.DataFrame, name: str) -> list[str]:
    """Count, per task, the documents of ``rows`` that are not drawn for want of a ``name``."""
    number, number_drawn = (
        frame.groupby("task", sort=False)["doc_hash"].nunique() for frame in (rows, drawn)
    )
    sentences = []
    for task, total in number.items():
        kept = number_drawn.get(task, 0)
        reason = f"without {name!r}" if kept else f"no two with a different {name!r}"
        if kept < total:
            sentences.append(f"{task}: {total - kept} of {total} documents left out ({reason})")
    return sentences


def describe_unpaired(rows: pd.DataFrame, first: str, second: str) -> list[str]:
    """Count the documents that only one of two tasks has."""
    a, b = (set(rows.loc[rows["task"] == task, "doc_hash"]) for task in (first, second))
    counts = {f"only in {first}": len(a - b), f"only in {second}": len(b - a)}
    listed = ", ".join(f"{count} {where}" for where, count in counts.items() if count)
    total = f"{sum(counts.values())} of {len(a | b)}"
    return [f"{total} documents left out ({listed})"] if listed else []


def describe_too_short(records: pd.DataFrame, last: int) -> list[str]:
    """Count the documents without a prompt of more than ``last`` tokens up to the measured one."""
    longest = records.groupby([*RUN, *DOCUMENT], sort=False, dropna=False)["position"].max()
    short = int((longest < last).sum())
    reason = f"at most {last} tokens up to the measured one"
    return [f"{short} of {len(longest)} documents left out ({reason})"] if short else []
