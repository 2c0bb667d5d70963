"""Runs compared with the first one, document by document: coupling, and lm-eval's scores."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lm_eval_coupling.report.overview_rows import overview, paired_difference
from lm_eval_coupling.report.score_differences import score_difference
from lm_eval_coupling.saved.prompting import differing
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.saved.values import means_of_parts, prompt_values, ranks_of
from lm_eval_coupling.saved.what_was_run import WhatWasRun

# Settings of measuring that no label has: ranks have rows of their own, and prompting the token.
_SETTINGS = ("dtype", "method", "depth_version")


def compare_runs(
    tables: Sequence[tuple[SavedRun, SavedTable]], problems: list[str]
) -> pd.DataFrame:
    """Compare every later table with the first one of its task, over the documents of both.

    Tables are compared with those of the weights that the first table is of; tasks that were not
    measured with these weights are left out. Documents are paired by ``doc_hash``: their prompts
    may differ, as with 0 and 5 examples, which the labels then name.

    Args:
        tables: tables, each with the run that it belongs to.
        problems: a sentence on each table that cannot be read is added.

    Returns:
        ``label, base, task, rank``, the means over the paired documents ``coupling`` and
        ``base_coupling``, and the columns of :func:`~.overview_rows.paired_difference`. Where both
        runs logged samples, the columns of :func:`~.score_differences.score_difference`, equal at
        every rank.
    """
    about = overview(tables, problems)
    if about.empty:
        return about
    about = about.drop_duplicates("file").set_index("file")
    tables = [(run, table) for run, table in tables if str(table.file) in about.index]
    labels, tasks = about["label"].tolist(), about["task"].tolist()
    couplings = [_document_couplings(prompt_values(table)) for _, table in tables]
    what = [run.what_was_run(table.task) for run, table in tables]
    bases: dict[str, int] = {}
    for number, own in enumerate(what):
        if own.weights == what[0].weights:
            bases.setdefault(tasks[number], number)
    rows = []
    for number, (label, task, own) in enumerate(zip(labels, tasks, couplings, strict=True)):
        base = bases.get(task, number)
        if base == number:
            continue
        runs = tables[number][0], tables[base][0]
        label, base_label = _with_differences(label, labels[base], what[number], what[base], runs)
        scores = score_difference(*runs, task, problems)
        for name in [name for name in own if name in couplings[base]]:
            both = pd.concat([own[name], couplings[base][name]], axis=1, join="inner").dropna()
            of_label, of_base = both.iloc[:, 0], both.iloc[:, 1]
            rows.append(
                {"label": label, "base": base_label, "task": task}
                | {"rank": int(name.removeprefix("coupling@"))}
                | {"coupling": of_label.mean(), "base_coupling": of_base.mean()}
                | paired_difference(of_label, of_base)
                | scores
            )
    return pd.DataFrame(rows)


def _with_differences(
    label: str, base: str, own: WhatWasRun, other: WhatWasRun, runs: tuple[SavedRun, SavedRun]
) -> tuple[str, str]:
    """Name in both labels everything in which the runs differ: dtype, prompts, answers, settings.

    Returns:
        The label of the run and that of the base.
    """
    texts = differing([own.prompting, other.prompting]) if own.prompting != other.prompting else {}
    dtypes = (own.dtype, other.dtype) if own.dtype != other.dtype else ("", "")
    settings = [run.settings for run in runs]
    differing_settings = [n for n in _SETTINGS if settings[0].get(n) != settings[1].get(n)]
    labels = []
    for text, what, dtype, of in zip((label, base), (own, other), dtypes, settings, strict=True):
        measured = [f"measured with {name}={of.get(name)}" for name in differing_settings]
        parts = [dtype, *measured, texts.get(what.prompting, "")]
        parts = [part for part in parts if part not in text]
        labels.append(f"{text} ({', '.join(parts)})" if parts else text)
    return labels[0], labels[1]


def _document_couplings(values: pd.DataFrame) -> pd.DataFrame:
    names = [f"coupling@{rank}" for rank in ranks_of(values)]
    return means_of_parts(values, ["doc_hash"], names)
