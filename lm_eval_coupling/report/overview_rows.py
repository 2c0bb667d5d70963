"""What a terminal shows of saved runs, as rows of numbers: one per run, task and rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.saved.names import full_names, label_rows
from lm_eval_coupling.saved.saved_run import SavedRun, SavedTable, identity
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values, ranks_of
from lm_eval_coupling.statistics.estimates import Estimate


def overview(tables: Sequence[tuple[SavedRun, SavedTable]]) -> pd.DataFrame:
    """One row per table and rank: means over documents with their standard errors, trained beside untrained weights.

    Returns:
        Columns: ``label`` (of the run), ``folder, model, revision, variant, prompting, task, documents, rank, coupling,
        coupling_stderr, chance, excess``; ``untrained, untrained_stderr, paired`` (documents that both weights have),
        ``difference, difference_stderr, difference_low, difference_high`` (trained less untrained, 95 %); every other number
        of a prompt by its name, with its error; ``worst_certificate, missing`` (in words), ``seed`` of the untrained
        weights.
    """
    rows = pd.DataFrame([row for run, table in tables for row in _rows(run, table)])
    return rows.assign(label=label_rows(rows, full_names(rows["model"].unique())))


def _rows(run: SavedRun, table: SavedTable) -> Iterator[dict[str, Any]]:
    values = prompt_values(table, "all")
    trained, untrained = (
        values[values["weights"] == weights] for weights in ("trained", "untrained")
    )
    about: dict[str, Any] = {
        "folder": str(table.file.parent),
        "model": run.model,
        "revision": run.revision,
        "variant": run.variant,
    }
    about |= {
        "fingerprint": run.fingerprint,
        "prompting": run.prompting(table.task),
        "task": table.task,
    }
    own, twin = document_values(trained), document_values(untrained)
    plain: dict[str, float] = {}
    for name in [name for name in own if "@" not in name]:
        plain[name], plain[f"{name}_stderr"], _ = mean_and_error(own[name])
    rest = {
        "worst_certificate": trained["worst_certificate"].max(),
        "missing": _missing(trained),
        "seed": (table.about.get("untrained") or {}).get("seed"),
    }
    ranks: Sequence[int | None] = ranks_of(trained) or [None]
    for rank in ranks:
        yield about | _coupling(own, twin, rank) | plain | rest


def _coupling(trained: pd.DataFrame, untrained: pd.DataFrame, rank: int | None) -> dict[str, Any]:
    name = f"coupling@{rank}"
    own, twin = (
        v[name].dropna() if name in v else pd.Series(dtype=float) for v in (trained, untrained)
    )
    mean, error, n = mean_and_error(own)
    chance = math.nan if rank is None else chance_coupling(rank)
    found = {
        "rank": rank,
        "documents": n,
        "coupling": mean,
        "coupling_stderr": error,
        "chance": chance,
    }
    found |= {"excess": mean - chance}
    found["untrained"], found["untrained_stderr"], _ = mean_and_error(twin)
    return found | paired(own, twin)


def paired(first: pd.Series, second: pd.Series) -> dict[str, float | int]:
    """``difference``, first less second over the documents that both have, with Student's 95 % interval."""
    differences = (
        (first - second).dropna() if len(first) and len(second) else pd.Series(dtype=float)
    )
    mean, error, n = mean_and_error(differences)
    estimate = Estimate.from_t(mean, error, max(n - 1, 1), 0.95)
    return {
        "paired": n,
        "difference": mean,
        "difference_stderr": error,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
    }


def _missing(values: pd.DataFrame) -> str:
    """How many prompts were not measured, and why."""
    names = [f"coupling@{rank}" for rank in ranks_of(values)]
    missing = values[values[names].isna().all(axis=1)] if names else values
    reasons = Counter(reason or "not asked for" for reason in missing["reason"])
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())


def comparison(tables: Sequence[tuple[SavedRun, SavedTable]]) -> pd.DataFrame:
    """Every later run against the first, over the documents that both have: base and instruct, 0 and 5 shots.

    The first is the weights of the first table; of a task that it has in several ways the first way.

    Returns:
        Documents are paired by ``doc_hash``: their prompts may differ. Columns: ``label, base, task, rank, coupling`` and
        ``base_coupling`` (means of the documents that are paired), and those of :func:`paired`.
    """
    about = overview(tables).drop_duplicates(["folder", "label", "task"])
    labels, tasks = about["label"].tolist(), about["task"].tolist()
    couplings = [_by_document(prompt_values(table)) for _, table in tables]
    first = identity(tables[0][0])
    of_first = [number for number, (run, _) in enumerate(tables) if identity(run) == first]
    bases = {tasks[number]: number for number in reversed(of_first)}
    found = []
    for number, (label, task, own) in enumerate(zip(labels, tasks, couplings, strict=True)):
        if bases.get(task, number) != number:
            base, other = labels[bases[task]], couplings[bases[task]]
            for name in [name for name in own if name in other]:
                both = pd.concat([own[name], other[name]], axis=1, join="inner").dropna()
                means = {
                    "coupling": both.iloc[:, 0].mean(),
                    "base_coupling": both.iloc[:, 1].mean(),
                }
                rank = int(name.removeprefix("coupling@"))
                found.append(
                    {"label": label, "base": base, "task": task, "rank": rank}
                    | means
                    | paired(both.iloc[:, 0], both.iloc[:, 1])
                )
    return pd.DataFrame(found)


def _by_document(values: pd.DataFrame) -> pd.DataFrame:
    names = [f"coupling@{rank}" for rank in ranks_of(values)]
    return values.groupby("doc_hash")[names].mean()
