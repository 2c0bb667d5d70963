"""Measured prompts of saved runs in pandas, each with the run that it belongs to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, flag, is_several, one_of, shown
from lm_eval_coupling.errors import path as as_path
from lm_eval_coupling.saved.saved_run import SavedRun, SavedRuns, SavedTable, find_runs

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
        newest: of the same weights, prompts and task in the same folder only the newest table, or an older one of more
            documents measured alike.
        columns: only those columns of the record that are named here, which saves most of the time.
        weights: ``trained``, ``untrained`` (the twin of ``coupling_untrained``) or ``all``, told apart in a column.
        places: ``first``, the token that the run's values are of, or ``all`` that ``coupling_position`` named.

    Returns:
        One row per measured prompt: the columns of the record, arrays as float32 NumPy arrays (``None`` where not
        measured), and of the run ``model, revision, variant`` (further arguments that make other weights of it),
        ``fingerprint, date``, ``untrained_seed`` of a twin's weights, and ``prompting``: how the prompts were made and which
        token was measured. Average over no two of these. A table that cannot be read is named and passed over.

    Raises:
        CouplingError: if there is no table, or the only one is not ours or of another schema version.
    """
    one_of("weights", weights, ("trained", "untrained", "all"))
    one_of("places", places, ("first", "all"))
    if columns is not None:
        names: list[Any] = list(columns) if is_several(columns) else [columns]
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise CouplingError(f"got columns={shown(wrong[0])}, expected names of columns")
        columns = names
    found = find_tables(as_path("path", path), newest=flag("newest", newest))
    return pd.concat(
        [read_table(run, table, columns, weights, places) for run, table in found],
        ignore_index=True,
    )


def find_tables(path: Path | str, *, newest: bool = True) -> list[tuple[SavedRun, SavedTable]]:
    """The tables at ``path`` with their runs, as :func:`load_records` reads them.

    Returns:
        Pairs of a run and one of its tables, nothing of which has been read but its header.

    Raises:
        CouplingError: if there is none.
    """
    runs = find_runs(path)
    found = runs.newest_tables() if newest else runs.with_tables()
    if Path(path).is_file():
        found = [(run, table) for run, table in found if Path(path) in (table.file, table.twin)]
    require_tables(found, runs, path)
    return found


def require_tables(
    found: Sequence[tuple[SavedRun, SavedTable]], runs: SavedRuns, path: Path | str
) -> None:
    """Say what was passed over.

    Raises:
        CouplingError: if nothing is left.
    """
    if not found:
        raise CouplingError(
            runs.passed_over[0]
            if runs.passed_over
            else f"got {path}, which has no coupling_*.parquet; give the output folder of a run with --model coupling-hf"
        )
    for problem in runs.passed_over:
        logger.warning("passed over: %s", problem)


def read_table(
    run: SavedRun,
    table: SavedTable,
    columns: Sequence[str] | None = None,
    weights: str = "trained",
    places: str = "first",
) -> pd.DataFrame:
    """The rows of one table with the columns of its run."""
    rows = table.read(columns, weights=weights, places=places).drop(
        columns="model", errors="ignore"
    )  # the run knows it in full
    about = {
        "model": run.model,
        "revision": run.revision,
        "variant": run.variant,
        "fingerprint": run.fingerprint,
        "prompting": run.prompting(table.task),
        "date": table.about.get("date"),
    }
    seed = (table.about.get("untrained") or {}).get("seed")
    told = {
        name: pd.Series([value] * len(rows), rows.index, dtype=object)
        for name, value in about.items()
    }
    twin = pd.Series(seed, rows.index, dtype=object).where(rows["weights"] == "untrained", None)
    return pd.concat([rows, pd.DataFrame(told | {"untrained_seed": twin})], axis=1)
