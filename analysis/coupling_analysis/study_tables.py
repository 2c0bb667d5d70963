"""Tables of studies: choose records, put one measure's values in each row, summarize them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.depth import different_layers
from lm_eval_coupling.measures.formulas.headline import chance_level, headline_rank
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.saved.names import label_weights, run_label
from lm_eval_coupling.saved.prompting import differing
from lm_eval_coupling.saved.records import read_table, require_tables
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.saved_table import passing_over
from lm_eval_coupling.saved.tables import require
from lm_eval_coupling.saved.values import means_of_parts
from lm_eval_coupling.statistics import adjust_p_values

RUN = ["model", "revision", "weights"]
DOCUMENT = ["task", "doc_hash", "prompt_hash"]
_PROMPT = ["doc_id", "prompt_index", "n_tokens", "position"]
_ALWAYS = [*DOCUMENT, *_PROMPT, "weights", "ranks", "measures", "reason", "window"]


def read(
    paths: Iterable[Path | str],
    tasks: Sequence[str] | None = None,
    *,
    weights: str | None = None,
    measures: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    places: str = "first",
) -> pd.DataFrame:
    """Read the newest record of every prompt, trained and untrained weights alike.

    ``model`` is the shortest name that tells a model from all others at ``paths``, whatever the
    tasks (:func:`~lm_eval_coupling.saved.names.labels`), so that all tables and pictures agree.

    Args:
        paths: folders that lm-eval wrote.
        tasks: these tasks only.
        weights: ``trained`` or ``untrained`` only.
        measures: readings to load; with ``columns``, nothing else is loaded.
        columns: further columns to load.
        places: ``first``, the token that the run's values are of, or ``all`` measured tokens.

    Returns:
        One row per run, prompt and token, in the order of the files.

    Raises:
        CouplingError: if nothing was saved there or nothing of these tasks or weights, or if one
            name stands for two models, two untrained twins or two ways of making the prompts.
    """
    paths = list(paths)
    runs = find_runs(paths)
    tables = runs.newest_tables()
    require_tables(tables, runs.passed_over, ", ".join(map(str, paths)))
    models = pd.DataFrame([{"model": run.model, "variant": run.variant} for run, _ in tables])
    names = label_weights(models).tolist()
    measured = sorted({table.task for _, table in tables})
    if unknown := [task for task in tasks or () if task not in measured]:
        raise CouplingError(
            f"got task {unknown[0]}, which was not measured; choose among {', '.join(measured)}"
        )
    sources = [readings()[name].column for name in measures or ()]
    every = measures is None and columns is None
    selected = None if every else [*_ALWAYS, *(columns or ()), *sources]
    frames: list[pd.DataFrame] = []
    problems: list[str] = []
    for name, (run, table) in zip(names, tables, strict=True):
        if not tasks or table.task in tasks:
            with passing_over(problems):
                rows = read_table(run, table, selected, "all", places)
                frames.append(rows.assign(model=name))
    require_tables(frames, problems, ", ".join(map(str, paths)))
    records = pd.concat(frames, ignore_index=True)
    _require_one_model_per_name(records)
    _require_one_prompt_per_document(records)
    if weights:
        records = require(records, [], weights=weights)
    _require_one_twin_per_name(records)
    prompt = [*RUN, *DOCUMENT, "prompt_index", "position"]
    by_date = records.sort_values("date", kind="stable")
    return by_date.drop_duplicates(prompt, keep="last").sort_index()


def _require_one_model_per_name(records: pd.DataFrame) -> None:
    """Refuse two models under one name: documents would be taken from either."""
    dated = records.dropna(subset="fingerprint")
    dates = dated.groupby(["model", "revision", "fingerprint"], sort=False)["date"].max()
    for run, of_run in dates.groupby(level=["model", "revision"], sort=False):
        if len(of_run) > 1:
            listed = " and ".join(
                f"{fingerprint[:8]} of {date}"
                for (*_, fingerprint), date in of_run.sort_values().items()
            )
            raise CouplingError(
                f"got {label_run(*run)} with different weights or configuration under one name "
                f"(fingerprints {listed}), expected one; give folders or --tasks that have one of "
                "them only"
            )


def _require_one_prompt_per_document(records: pd.DataFrame) -> None:
    """Refuse a task whose prompts were made in two ways, such as with 0 and 5 examples."""
    for (model, revision, task), rows in records.groupby(["model", "revision", "task"], sort=False):
        if rows["prompting"].nunique() > 1:
            ways = "; ".join(differing(rows["prompting"].unique()).values())
        elif rows["date"].nunique() > 1 and not _have_same_prompts(rows):
            ways = "of " + " and of ".join(sorted(rows["date"].unique()))
        else:
            continue
        raise CouplingError(
            f"got {task} of {label_run(model, revision)} with different prompts ({ways}), expected "
            "one way of making them; give folders of one of them"
        )


def _have_same_prompts(rows: pd.DataFrame) -> bool:
    """Return whether documents that several runs measured had the same prompts in all of them."""
    prompts = rows.groupby(["doc_hash", "date"])["prompt_hash"].agg(
        lambda hashes: tuple(sorted(set(hashes)))
    )
    return not (prompts.groupby(level="doc_hash").nunique() > 1).any()


def _require_one_twin_per_name(records: pd.DataFrame) -> None:
    seeded = records.dropna(subset="untrained_seed")
    for run, seeds in seeded.groupby(["model", "revision"])["untrained_seed"]:
        if seeds.nunique() > 1:
            listed = " and ".join(map(str, sorted(seeds.unique())))
            raise CouplingError(
                f"got untrained twins of {label_run(*run)} of the seeds {listed}, expected one; "
                "give folders or --tasks that have one of them only"
            )


def choose_rank(records: pd.DataFrame, rank: int | None = None) -> int:
    """Return ``rank`` if all records have it; by default 10, or else the smallest common one.

    Returns:
        The number K of singular vectors.

    Raises:
        CouplingError: if not all records have this rank, or have no rank in common.
    """
    common = common_ranks(records)
    if rank is None and common:
        return headline_rank(common)
    if rank not in common:
        listed = ", ".join(map(str, common)) or "there is none"
        raise CouplingError(
            f"got rank {rank}, expected one that all records have ({listed}); "
            f"measure again with coupling_ranks={rank or 10}"
        )
    return rank


def common_ranks(records: pd.DataFrame) -> list[int]:
    """Return the ranks that all records have, ascending."""
    return sorted(set.intersection(*(set(ranks) for ranks in records["ranks"])))


def long(records: pd.DataFrame, measures: Sequence[str], rank: int) -> pd.DataFrame:
    """Put each document's values of these measures in rows, averaged over its prompts.

    Returns:
        One row per measure, document and depth: ``model, revision, weights, task, doc_hash,
        prompt_hash, measure, depth, value, n_tokens``. Undefined values are NaN. Documents with a
        prompt that lacks the measure are left out.

    Raises:
        CouplingError: if no record has one of the measures.
    """
    rows = []
    for name in measures:
        reading = readings()[name]
        for record in whole_documents(records, reading.column).to_dict("records"):
            depth, value = reading.in_depth(record, rank)
            about = {key: record[key] for key in (*RUN, *DOCUMENT, "n_tokens")}
            rows.append(pd.DataFrame(about | {"measure": name, "depth": depth, "value": value}))
    keys = [*RUN, *DOCUMENT, "measure", "depth"]
    return means_of_parts(pd.concat(rows), keys, ["value", "n_tokens"]).reset_index()


def whole_documents(records: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the records of the documents of which every prompt has a value of ``column``.

    Returns:
        At least one row. Trained and untrained weights count as different documents.

    Raises:
        CouplingError: if no document has a value in every prompt.
    """
    known = require(records, [column])
    lacking, of_known = (
        pd.MultiIndex.from_frame(rows[[*RUN, *DOCUMENT]])
        for rows in (records.drop(known.index), known)
    )
    if (kept := known[~of_known.isin(lacking)]).empty:
        raise CouplingError(
            f"got no document with {column} in all of its prompts; measure again those that failed"
        )
    return kept


def quartiles(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Summarize rows of :func:`long` over documents, see :func:`summarize`.

    Returns:
        One row per group of ``by``, measure and depth.
    """
    return summarize(rows, [*by, "measure", "depth"])


def summarize(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return ``mean, stderr, q25, median, q75, n, undefined`` of ``value`` in each group."""
    values = rows.groupby(list(by), sort=False, dropna=False)["value"]
    summary = values.agg(
        mean="mean",
        stderr=lambda v: v.std(ddof=1) / np.sqrt(v.notna().sum()),
        q25=lambda v: v.quantile(0.25),
        median="median",
        q75=lambda v: v.quantile(0.75),
        n="count",
        undefined=lambda v: v.isna().sum(),
    )
    return summary.reset_index()


def mean_matrices(
    records: pd.DataFrame, rank: int, by: Sequence[str] = RUN
) -> dict[tuple, tuple[Float[np.ndarray, "layer layer"], int]]:
    """Average m̃[l, l'] over the documents of each group; NaN on the diagonal.

    Returns:
        For each group the mean matrix and the number of documents.
    """
    documents = _document_matrices(records, rank, by)
    return {key: (nanmean(matrices), len(matrices)) for key, matrices in documents.items()}


def pairs_beyond_chance(
    records: pd.DataFrame, rank: int, by: Sequence[str] = RUN, *, level: float = 0.05
) -> dict[tuple, Bool[np.ndarray, "layer layer"]]:
    """Test which pairs of layers are coupled more than by chance, over documents.

    Student's one-sided test compares the mean of m̃[l, l'] and m̃[l', l] with chance; Holm adjusts
    for the number of pairs. One document alone has no error, hence no pair.

    Returns:
        For each group a symmetric matrix, in the order of :func:`mean_matrices`.
    """
    clear = {}
    for key, documents in _document_matrices(records, rank, by).items():
        excess = chance_level(rank) - (documents + documents.transpose(0, 2, 1)) / 2
        upper = np.triu_indices(excess.shape[1], 1)
        is_clear = np.zeros(excess.shape[1:], dtype=bool)
        p_values = _p_above_zero(excess[:, upper[0], upper[1]])
        is_clear[upper] = adjust_p_values(p_values) < level
        clear[key] = is_clear | is_clear.T
    return clear


def _document_matrices(
    records: pd.DataFrame, rank: int, by: Sequence[str]
) -> dict[tuple, np.ndarray]:
    """Return m̃ of each group, [document layer layer], averaged over a document's prompts."""
    documents = whole_documents(records, "normalized_miscoupling")
    return {
        key: np.stack(
            [
                nanmean(np.stack([different_layers(row, rank) for row in of.to_dict("records")]))
                for _, of in group.groupby(DOCUMENT, sort=False)
            ]
        )
        for key, group in documents.groupby(list(by), sort=False)
    }


def _p_above_zero(
    values: Float[np.ndarray, "document column"],
) -> Float[np.ndarray, " column"]:
    """Return Student's one-sided p-value of each column's mean; NaN below two values."""
    n = np.isfinite(values).sum(axis=0)
    mean = nanmean(values)
    variance = np.nansum((values - mean) ** 2, axis=0) / np.maximum(n - 1, 1) / np.maximum(n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / np.sqrt(variance)
    return np.where(n > 1, stats.t.sf(t, np.maximum(n - 1, 1)), np.nan)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Average over the first axis; NaN, without NumPy's warning, where all entries are NaN."""
    n = np.isfinite(values).sum(axis=0)
    return np.where(n, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)


def recorded_measures(
    records: pd.DataFrame, measures: Sequence[str], required: int = 0
) -> list[str]:
    """Return the measures that were recorded, and the first ``required`` in any case."""
    columns = [readings()[name].column for name in measures]
    return [
        name
        for i, (name, column) in enumerate(zip(measures, columns, strict=True))
        if i < required or (column in records and records[column].notna().any())
    ]


def named(rows: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Add what a picture needs: ``panel`` (the measure's label), ``line`` (the run), ``chance``."""
    panels = rows["measure"].map(lambda name: readings()[name].label)
    chances = rows["measure"].map(lambda name: readings()[name].chance_at(rank))
    return add_line_names(rows).assign(panel=panels, chance=chances)


def quartile_rows(records: pd.DataFrame, measures: Sequence[str], rank: int) -> pd.DataFrame:
    """Return each run's quartiles over documents of these measures, ready to be drawn."""
    return named(quartiles(long(records, measures, rank), RUN), rank)


def add_line_names(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``line``: the label of the run, and the task if there are several."""
    runs = zip(rows["model"], rows["revision"], strict=True)
    lines = [label_run(model, revision) for model, revision in runs]
    if "task" in rows and rows["task"].nunique() > 1:
        lines = [f"{line}, {task}" for line, task in zip(lines, rows["task"], strict=True)]
    return rows.assign(line=lines)


def label_run(model: str, revision: str | None = None, weights: str | None = None) -> str:
    """Name a run: the model, its revision unless that is main, and whether it is untrained."""
    return run_label(model, revision) + (", untrained" if weights == "untrained" else "")
