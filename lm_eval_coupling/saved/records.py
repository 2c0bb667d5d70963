"""Measured prompts of saved runs in pandas, each with the run that it belongs to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, flag, is_several, one_of, shown
from lm_eval_coupling.errors import path as as_path
from lm_eval_coupling.measures.registry import measured_columns, registered_measures
from lm_eval_coupling.saved.saved_run import SavedRun, SavedRuns, find_runs
from lm_eval_coupling.saved.saved_table import SavedTable, passing_over

logger = logging.getLogger(__name__)


def load_records(
    path: Path | str,
    *,
    newest: bool = True,
    columns: Sequence[str] | None = None,
    weights: str = "trained",
    places: str = "first",
) -> pd.DataFrame:
    """Read saved tables.

    Args:
        path: one table, or a folder that is searched recursively.
        newest: of the same weights, prompts and task in the same folder only the newest table, or
            an older one of more documents measured alike.
        columns: only these columns of the record, which saves most of the time; by default all
            that a run was asked to record.
        weights: ``trained``, ``untrained`` (the twin of ``coupling_untrained``) or ``all``.
        places: ``first``, the token that the run's values are of, or ``all`` measured tokens.

    Returns:
        One row per measured prompt. Columns of the record: arrays as float32 NumPy arrays, None
        where not measured. Columns of the run: ``model, revision, variant`` (further arguments that
        make other weights), ``fingerprint, date``, ``untrained_seed`` of a twin's weights, and
        ``prompting``: how the prompts were made and which token was measured. Average over no two
        of these. A table that cannot be read is named in a warning and passed over.

    Raises:
        CouplingError: if there is no table, or the only one is not ours or of another schema
            version.
    """
    one_of("weights", weights, ("trained", "untrained", "all"))
    one_of("places", places, ("first", "all"))
    if columns is not None:
        names: list[Any] = list(columns) if is_several(columns) else [columns]
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise CouplingError(f"got columns={shown(wrong[0])}, expected names of columns")
        columns = names
    tables = find_tables(as_path("path", path), newest=flag("newest", newest))
    frames: list[pd.DataFrame] = []
    problems: list[str] = []
    for run, table in tables:
        with passing_over(problems):
            frames.append(read_table(run, table, columns, weights, places))
    require_tables(frames, problems, path)
    records = pd.concat(frames, ignore_index=True)
    return records if columns is not None else _without_unasked(records)


def _without_unasked(records: pd.DataFrame) -> pd.DataFrame:
    """Leave out columns that no run was asked to record and that are empty throughout."""
    asked = {name for names in records["measures"] for name in names or ()}
    expected = {
        column.name
        for name, measure in registered_measures().items()
        for column in measure.columns
        if name in asked and not column.option
    }
    unasked = [name for name in measured_columns() if name in records and name not in expected]
    return records.drop(columns=[name for name in unasked if records[name].isna().all()])


def find_tables(path: Path | str, *, newest: bool = True) -> list[tuple[SavedRun, SavedTable]]:
    """Find the tables at ``path`` with their runs, as :func:`load_records` reads them.

    Returns:
        Pairs of a run and one of its tables, of which nothing but the header has been read.

    Raises:
        CouplingError: if there is none.
    """
    runs: SavedRuns = find_runs(path)
    tables = runs.newest_tables() if newest else runs.with_tables()
    if Path(path).is_file():
        tables = [pair for pair in tables if Path(path) in (pair[1].file, pair[1].twin)]
    require_tables(tables, runs.passed_over, path)
    return tables


def require_tables(tables: Sequence[Any], problems: Sequence[str], path: Path | str) -> None:
    """Warn of what was passed over.

    Raises:
        CouplingError: if no table is left.
    """
    if not len(tables):  # it may be a frame, whose truth value is undefined
        raise CouplingError(
            problems[0]
            if problems
            else f"got {path}, which has no coupling_*.parquet; give the output folder of a run "
            "with --model coupling-hf"
        )
    for problem in dict.fromkeys(problems):
        logger.warning("passed over: %s", problem)


def read_table(
    run: SavedRun,
    table: SavedTable,
    columns: Sequence[str] | None = None,
    weights: str = "trained",
    places: str = "first",
) -> pd.DataFrame:
    """Read the rows of one table, with the columns of its run (:func:`load_records`)."""
    rows = table.read(columns, weights=weights, places=places)
    rows = rows.drop(columns="model", errors="ignore")  # the run has the full name
    what = run.what_was_run(table.task)
    about = {
        "model": what.model,
        "revision": what.revision,
        "variant": what.variant,
        "fingerprint": what.fingerprint,
        "prompting": what.prompting,
        "date": table.about.get("date"),
    }
    of_run = {
        name: pd.Series([value] * len(rows), rows.index, dtype=object)
        for name, value in about.items()
    }
    seed = (table.about.get("untrained") or {}).get("seed")
    seeds = pd.Series(seed, rows.index, dtype=object).where(rows["weights"] == "untrained", None)
    return pd.concat([rows, pd.DataFrame(of_run | {"untrained_seed": seeds})], axis=1)
