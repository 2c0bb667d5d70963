"""Runs compared with the first one, document by document: coupling, and lm-eval's scores."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lm_eval_coupling.report.overview_rows import overview, paired_difference
from lm_eval_coupling.report.score_differences import score_difference
from lm_eval_coupling.saved.saved_run import SavedRun, SavedTable, identity
from lm_eval_coupling.saved.values import prompt_values, ranks_of


def compare_runs(tables: Sequence[tuple[SavedRun, SavedTable]]) -> pd.DataFrame:
    """Compare every later run with the first, over the documents that both have.

    The first run is that of the first table. Documents are paired by ``doc_hash``: their prompts
    may differ, as with 0 and 5 examples.

    Returns:
        ``label, base, task, rank``, the means over the paired documents ``coupling`` and
        ``base_coupling``, and the columns of :func:`~.overview_rows.paired_difference`. Where both
        runs logged samples, the columns of :func:`~.score_differences.score_difference`, equal at
        every rank.
    """
    about = overview(tables).drop_duplicates(["folder", "label", "task"])
    labels, tasks = about["label"].tolist(), about["task"].tolist()
    couplings = [_document_couplings(prompt_values(table)) for _, table in tables]
    first = identity(tables[0][0])
    bases: dict[str, int] = {}
    for number, (run, _) in enumerate(tables):
        if identity(run) == first:
            bases.setdefault(tasks[number], number)
    rows = []
    for number, (label, task, own) in enumerate(zip(labels, tasks, couplings, strict=True)):
        base = bases.get(task, number)
        if base == number:
            continue
        scores = score_difference(tables[number][0], tables[base][0], task)
        for name in [name for name in own if name in couplings[base]]:
            both = pd.concat([own[name], couplings[base][name]], axis=1, join="inner").dropna()
            of_label, of_base = both.iloc[:, 0], both.iloc[:, 1]
            rows.append(
                {"label": label, "base": labels[base], "task": task}
                | {"rank": int(name.removeprefix("coupling@"))}
                | {"coupling": of_label.mean(), "base_coupling": of_base.mean()}
                | paired_difference(of_label, of_base)
                | scores
            )
    return pd.DataFrame(rows)


def _document_couplings(values: pd.DataFrame) -> pd.DataFrame:
    names = [f"coupling@{rank}" for rank in ranks_of(values)]
    return values.groupby("doc_hash")[names].mean()
