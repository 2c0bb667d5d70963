"""Records in, tidy tables out: which records a study takes, its measures in rows, and their quartiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.depth import different_layers
from lm_eval_coupling.measures.formulas.headline import chance_level, headline_rank
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.saved.names import ends_with, label_weights, run_label
from lm_eval_coupling.saved.prompting import differing
from lm_eval_coupling.saved.records import read_table, require_tables
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.tables import require
from lm_eval_coupling.statistics import adjust_p_values

RUN = ["model", "revision", "weights"]
DOCUMENT = ["task", "doc_hash", "prompt_hash"]
_KEYS = [
    *DOCUMENT,
    "doc_id",
    "prompt_index",
    "weights",
    "n_tokens",
    "position",
    "ranks",
    "measures",
    "reason",
]


def read(
    paths: Iterable[Path | str],
    tasks: Sequence[str] | None = None,
    *,
    weights: str | None = None,
    measures: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The records at ``paths``, each prompt of a run and its weights once, the newest; ``weights`` is always there.

    Read is what tells prompts apart, what these ``measures`` are read from, and these ``columns``; else all.

    ``model`` is no more of a model's name than tells it from all others there, whatever the tasks
    (:func:`~lm_eval_coupling.saved.names.labels`): the same in every table and picture.

    Returns:
        One row per prompt and token, in the order of the files.

    Raises:
        CouplingError: if nothing was saved there, nothing of these tasks or weights, or if one name has two models' records,
            two untrained twins' or two ways of making the prompts.
    """
    paths = list(paths)
    runs = find_runs(paths)
    tables = runs.newest_tables()
    require_tables(tables, runs, ", ".join(map(str, paths)))
    names = label_weights(
        pd.DataFrame([dict(model=r.model, variant=r.variant) for r, _ in tables])
    ).tolist()
    known = sorted({table.task for _, table in tables})
    if unknown := [task for task in tasks or () if task not in known]:
        raise CouplingError(
            f"got task {unknown[0]}, which was not measured; choose among {', '.join(known)}"
        )
    chosen = [
        *_KEYS,
        "window",
        *(columns or ()),
        *(readings()[name].column for name in measures or ()),
    ]
    wanted = None if measures is columns is None else chosen
    records = pd.concat(
        [
            read_table(run, table, wanted, "all").assign(model=name)
            for name, (run, table) in zip(names, tables, strict=True)
            if not tasks or table.task in tasks
        ],
        ignore_index=True,
    )
    _require_one_model_a_name(records)
    _require_one_prompt_a_document(records)
    prompt = [*RUN, *DOCUMENT, "prompt_index", "position"]
    if weights:
        records = require(records, [], weights=weights)
    _require_one_twin_a_name(records)
    return (
        records.sort_values("date", kind="stable").drop_duplicates(prompt, keep="last").sort_index()
    )


def _require_one_model_a_name(records: pd.DataFrame) -> None:
    """Documents that were not measured again would else count with those of the newer weights."""
    known = (
        records.dropna(subset="fingerprint")
        .groupby(["model", "revision", "fingerprint"], sort=False)["date"]
        .max()
    )
    for run, dates in known.groupby(level=["model", "revision"], sort=False):
        if len(dates) > 1:
            told = " and ".join(
                f"{fingerprint[:8]} of {date}"
                for (*_, fingerprint), date in dates.sort_values().items()
            )
            raise CouplingError(
                f"got {label(*run)} with different weights or configuration under one name (fingerprints {told}), expected "
                "one; give folders or --tasks that have one of them only"
            )


def _require_one_prompt_a_document(records: pd.DataFrame) -> None:
    """Prompts with 0 and 5 examples of the same documents are no sample of one thing."""
    for (model, revision, task), of in records.groupby(["model", "revision", "task"], sort=False):
        if of["prompting"].nunique() > 1:
            told = "; ".join(differing(of["prompting"].unique()).values())
        elif of["date"].nunique() > 1 and not _same_prompts(of):
            told = "of " + " and of ".join(sorted(of["date"].unique()))
        else:
            continue
        raise CouplingError(
            f"got {task} of {label(model, revision)} with different prompts ({told}), expected one way of making them; give "
            "folders of one of them"
        )


def _same_prompts(of: pd.DataFrame) -> bool:
    """Whether a document that several runs measured had the same prompts in all of them."""
    prompts = of.groupby(["doc_hash", "date"])["prompt_hash"].agg(
        lambda hashes: tuple(sorted(set(hashes)))
    )
    return not (prompts.groupby(level="doc_hash").nunique() > 1).any()


def _require_one_twin_a_name(records: pd.DataFrame) -> None:
    for run, seeds in records.dropna(subset="untrained_seed").groupby(["model", "revision"])[
        "untrained_seed"
    ]:
        if seeds.nunique() > 1:
            told = " and ".join(map(str, sorted(seeds.unique())))
            raise CouplingError(
                f"got untrained twins of {label(*run)} of the seeds {told}, expected one; give folders or --tasks "
                "that have one of them only"
            )


def choose_rank(records: pd.DataFrame, rank: int | None = None) -> int:
    """``rank`` if all records have it; without one 10, or else the smallest that all have.

    Returns:
        The number K.

    Raises:
        CouplingError: if they do not.
    """
    common = common_ranks(records)
    if rank is None and common:
        return headline_rank(common)
    if rank not in common:
        raise CouplingError(
            f"got rank {rank}, expected one that all records have ({', '.join(map(str, common)) or 'there is none'}); "
            f"measure again with coupling_ranks={rank or 10}"
        )
    return rank


def common_ranks(records: pd.DataFrame) -> list[int]:
    """The ranks that all records have, ascending."""
    return sorted(set.intersection(*(set(ranks) for ranks in records["ranks"])))


def long(records: pd.DataFrame, measures: Sequence[str], rank: int) -> pd.DataFrame:
    """Every document's values of these measures: ``model, revision, weights, task, doc_hash, prompt_hash, measure, depth,
    value, n_tokens``; of several prompts of a document their mean.

    Returns:
        One row per measure, document and place in depth; NaN where it is undefined.

    Raises:
        CouplingError: if no record has one of the measures.
    """
    rows = []
    for name in measures:
        reading = readings()[name]
        for record in require(records, [reading.column]).to_dict("records"):
            depth, value = reading.in_depth(record, rank)
            about = {key: record[key] for key in (*RUN, *DOCUMENT, "n_tokens")}
            rows.append(pd.DataFrame(about | {"measure": name, "depth": depth, "value": value}))
    keys = [*RUN, *DOCUMENT, "measure", "depth"]
    return (
        pd.concat(rows)
        .groupby(keys, sort=False, dropna=False, as_index=False)[["value", "n_tokens"]]
        .mean()
    )


def quartiles(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """``rows`` of :func:`long` summarised over documents: ``mean, stderr, q25, median, q75``, their number ``n``, and how
    many are ``undefined``.

    Returns:
        One row for each group of ``by``, measure and depth.
    """
    return summary(rows, [*by, "measure", "depth"])


def summary(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """``mean, stderr, q25, median, q75, n, undefined`` of the column ``value`` in the groups of ``by``."""
    values = rows.groupby(list(by), sort=False, dropna=False)["value"]
    found = values.agg(
        mean="mean",
        stderr=lambda v: v.std(ddof=1) / np.sqrt(v.notna().sum()),
        q25=lambda v: v.quantile(0.25),
        median="median",
        q75=lambda v: v.quantile(0.75),
        n="count",
        undefined=lambda v: v.isna().sum(),
    )
    return found.reset_index()


def mean_matrices(
    records: pd.DataFrame, rank: int, by: Sequence[str] = RUN
) -> dict[tuple, tuple[np.ndarray, int]]:
    """m̃[layer, layer'] averaged over the documents of every group, NaN on the diagonal, and the number of documents."""
    found = {}
    for key, group in require(records, ["normalized_miscoupling"]).groupby(list(by), sort=False):
        documents = [
            nanmean(
                np.stack([different_layers(record, rank) for record in prompts.to_dict("records")])
            )
            for _, prompts in group.groupby(DOCUMENT, sort=False)
        ]
        found[key] = nanmean(np.stack(documents)), len(documents)
    return found


def pairs_beyond_chance(
    records: pd.DataFrame, rank: int, by: Sequence[str] = RUN, *, level: float = 0.05
) -> dict[tuple, np.ndarray]:
    """Which pairs of layers are coupled more than by chance, beyond the error of their mean over documents.

    Student's one-sided test of the mean of m̃[l, l'] and m̃[l', l] against chance, adjusted by Holm for all pairs of layers.
    Of a single document there is no error, and no pair is.

    Returns:
        For every group a symmetric matrix of truth values, in the order of :func:`mean_matrices`.
    """
    found = {}
    for key, group in require(records, ["normalized_miscoupling"]).groupby(list(by), sort=False):
        documents = np.stack(
            [
                nanmean(
                    np.stack(
                        [different_layers(record, rank) for record in prompts.to_dict("records")]
                    )
                )
                for _, prompts in group.groupby(DOCUMENT, sort=False)
            ]
        )
        pairs = chance_level(rank) - (documents + documents.transpose(0, 2, 1)) / 2
        upper = np.triu_indices(pairs.shape[1], 1)
        clear = np.zeros(pairs.shape[1:], dtype=bool)
        clear[upper] = adjust_p_values(_above_zero(pairs[:, upper[0], upper[1]])) < level
        found[key] = clear | clear.T
    return found


def _above_zero(values: np.ndarray) -> np.ndarray:
    """One-sided p-values of Student's test for the mean of each column; NaN below two values, 0 or 1 without any spread."""
    n = np.isfinite(values).sum(axis=0)
    mean = nanmean(values)
    variance = np.nansum((values - mean) ** 2, axis=0) / np.maximum(n - 1, 1) / np.maximum(n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / np.sqrt(variance)
    return np.where(n > 1, stats.t.sf(t, np.maximum(n - 1, 1)), np.nan)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is defined; NaN, without a warning, where nothing is."""
    n = np.isfinite(values).sum(axis=0)
    return np.where(n, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)


def recorded(records: pd.DataFrame, measures: Sequence[str], needed: int = 0) -> list[str]:
    """Those of ``measures`` that were recorded, the first ``needed`` of them whether or not."""
    return [
        name
        for i, name in enumerate(measures)
        if i < needed or _is_recorded(records, readings()[name].column)
    ]


def _is_recorded(records: pd.DataFrame, column: str) -> bool:
    return column in records and bool(records[column].notna().any())


def named(rows: pd.DataFrame, rank: int) -> pd.DataFrame:
    """``rows`` with what a picture needs: ``panel`` (the measure's label), ``line`` (the run) and ``chance``."""
    panels = rows["measure"].map(lambda name: readings()[name].label)
    chances = rows["measure"].map(lambda name: readings()[name].chance_at(rank))
    return with_line(rows).assign(panel=panels, chance=chances)


def with_line(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with a column ``line``: the label of their run, and the task if there are several."""
    lines = [
        label(model, revision)
        for model, revision in zip(rows["model"], rows["revision"], strict=True)
    ]
    if "task" in rows and rows["task"].nunique() > 1:
        lines = [f"{line}, {task}" for line, task in zip(lines, rows["task"], strict=True)]
    return rows.assign(line=lines)


def label(model: str, revision: str | None = None, weights: str | None = None) -> str:
    """Of a run of :func:`read`: the model, its revision if that is not main, untrained if it is."""
    return run_label(model, revision) + (", untrained" if weights == "untrained" else "")


def of_model(records: pd.DataFrame, name: str) -> pd.DataFrame:
    """The records of :func:`read` that are of the model with this name: the tokens of another would be other words.

    Returns:
        At least one record.

    Raises:
        CouplingError: if there is none, or it may be one of several.
    """
    known = sorted(records["model"].unique())
    meant = sorted((model for model in known if ends_with(name, model)), key=len)[-1:]
    meant = meant or [model for model in known if ends_with(model, name)]
    if not meant:
        listed = ", ".join(known)
        raise CouplingError(
            f"got records of {listed}, none of {name}; give the folder of a run that measured this model"
        )
    if len(meant) > 1:
        raise CouplingError(f"got {name}, which may be {' or '.join(meant)}; give more of its path")
    return records[records["model"] == meant[0]]


def of_document(records: pd.DataFrame, doc: int | None) -> pd.DataFrame:
    """The records of the document with this ``doc_id``; all of them for None.

    Returns:
        At least one record.

    Raises:
        CouplingError: if there is no such document.
    """
    if doc is None:
        return records
    known = sorted(records["doc_id"].unique())
    if doc not in known:
        listed = ", ".join(map(str, known[:20])) + (", …" if len(known) > 20 else "")
        raise CouplingError(f"got document {doc}, which has no such record; choose among {listed}")
    return records[records["doc_id"] == doc]


def chosen(wanted: Sequence[int] | None, known: Sequence[int], number: int) -> list[int]:
    """``wanted`` layers, or ``number`` of the ``known`` ones spread evenly.

    Returns:
        Layers, as they are numbered in ``known``.

    Raises:
        CouplingError: if one is not known.
    """
    if bad := [layer for layer in wanted or () if layer not in known]:
        raise CouplingError(f"got layer {bad[0]}, expected one of {', '.join(map(str, known))}")
    return list(
        wanted
        or dict.fromkeys(
            known[i] for i in np.linspace(0, len(known) - 1, number).round().astype(int)
        )
    )
