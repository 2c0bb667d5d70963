"""The coupling tables of one task of a run, read by columns and some rows at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.saved.arrow_columns import frame_of_columns
from lm_eval_coupling.saved.open_table import OpenTable, UnreadableTable, open_table
from lm_eval_coupling.saved.precedence import Standing
from lm_eval_coupling.saved.results_file import number

_ROWS_AT_ONCE = 64  # whose matrices are held together


@dataclasses.dataclass(frozen=True)
class SavedTable:
    """The coupling tables of one task of a run, read as one.

    Attributes:
        file: of the trained weights; of the untrained ones where there is no other.
        about: its provenance, as the run wrote it.
        columns: their names, in order.
        twin: the table of the untrained weights, where they were measured.
        kept_open: files of :meth:`opened`, which every reading opens otherwise.
    """

    file: Path
    about: Mapping[str, Any]
    columns: tuple[str, ...]
    twin: Path | None = None
    kept_open: Mapping[Path, OpenTable] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def task(self) -> str:
        """The task whose documents it holds."""
        return self.about["task"]

    @property
    def standing(self) -> Standing:
        """The extent of its measurements, to compare with other tables of its task."""
        summary = (self.about.get("tasks") or {}).get(self.task) or {}
        measured = number(summary.get("measured", 0))
        return Standing.of(self.about.get("settings") or {}, measured, math.nan)

    @contextlib.contextmanager
    def opened(self) -> Iterator[SavedTable]:
        """Keep the files open for several readings: opening takes as long as reading few rows.

        Yields:
            The table, for use in the block.

        Raises:
            UnreadableTable: if a file cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            files = {file: stack.enter_context(open_table(file)) for file in self._files("all")}
            yield dataclasses.replace(self, kept_open=files)

    def read(
        self,
        columns: Sequence[str] | None = None,
        *,
        weights: str = "trained",
        places: str = "first",
    ) -> pd.DataFrame:
        """Read all rows at once; arguments and errors are those of :meth:`batches`."""
        parts = []
        for file in self._files(weights):
            with self._open(file) as table:
                rows = frame_of_columns(table.read(self._present(columns)))
            parts.append(_select(rows, columns, weights, places))
        return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)

    def read_columns(
        self, columns: Sequence[str], weights: str, places: str = "first"
    ) -> dict[str, np.ndarray]:
        """Read columns without a frame.

        Args:
            columns: those to read, ``weights`` and ``place`` besides, as far as the table has them.
            weights: ``trained``, ``untrained`` or ``all``.
            places: ``first``, of the tokens that a prompt was measured at, or ``all``.

        Returns:
            An array for each column; of objects where it holds no numbers.

        Raises:
            UnreadableTable: if the table is damaged.
        """
        parts: list[dict[str, np.ndarray]] = []
        for file in self._files(weights):
            with self._open(file) as table:
                part = table.read(self._present(columns))
            kept = (
                is_first(part["place"]) if places == "first" else np.ones(len(part["place"]), bool)
            )
            if weights != "all":
                kept &= part["weights"] == weights
            parts.append({name: values[kept] for name, values in part.items()})
        names = parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        weights: str = "trained",
        places: str = "first",
        rows: int = _ROWS_AT_ONCE,
    ) -> Iterator[pd.DataFrame]:
        """Read some rows at a time.

        Args:
            columns: those to read, ``weights`` besides, as far as the table has them; None for all.
            weights: ``trained``, ``untrained`` or ``all``.
            places: ``first``, of the tokens that a prompt was measured at, or ``all``.
            rows: at most so many at a time.

        Yields:
            A frame of the columns; at least one, which may be empty.

        Raises:
            UnreadableTable: if the table is damaged.
        """
        present, is_empty = self._present(columns), True
        for file in self._files(weights):
            with self._open(file) as table:
                for batch in table.batches(present, rows):
                    part = _select(frame_of_columns(batch), columns, weights, places)
                    if len(part):
                        is_empty = False
                        yield part
        if is_empty:
            yield self.read(columns, weights=weights, places=places)

    def records(
        self, columns: Sequence[str], *, weights: str = "trained"
    ) -> Iterator[dict[str, Any]]:
        """Read rows of the first measured token one by one, as :meth:`batches` without frames.

        Args:
            columns: those to read, as far as the table has them.
            weights: ``trained``, ``untrained`` or ``all``.

        Yields:
            A row's values by column.

        Raises:
            UnreadableTable: if the table is damaged.
        """
        present = self._present(columns)
        for file in self._files(weights):
            with self._open(file) as table:
                for batch in table.batches(present, _ROWS_AT_ONCE):
                    values = {name: column.tolist() for name, column in batch.items()}
                    for row in zip(*values.values(), strict=True):
                        record = dict(zip(values, row, strict=True))
                        if not record["place"] and weights in ("all", record["weights"]):
                            yield record

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[OpenTable]:
        if file in self.kept_open:
            yield self.kept_open[file]
        else:
            with open_table(file) as table:
                yield table

    def _files(self, weights: str) -> list[Path]:
        """Return the files that may have rows of these weights; the first gives the columns."""
        return [self.file, *([self.twin] if self.twin and weights != "trained" else [])]

    def _present(self, columns: Sequence[str] | None) -> list[str] | None:
        if columns is None:
            return None
        return [name for name in self.columns if name in (*columns, "weights", "place")]


def _select(
    rows: pd.DataFrame, columns: Sequence[str] | None, weights: str, places: str
) -> pd.DataFrame:
    """Return the rows of these weights and places."""
    kept = np.ones(len(rows), dtype=bool)
    if weights != "all":
        kept &= (rows["weights"] == weights).to_numpy(dtype=bool)
    if places == "first":
        kept &= is_first(rows["place"])
    if columns is not None and "place" not in columns:
        del rows["place"]
    return rows if kept.all() else rows[kept].reset_index(drop=True)


def is_first(places: Iterable[Any]) -> np.ndarray:
    """Return for each row whether it is of the first of the tokens of its prompt."""
    return np.array([not place for place in places], dtype=bool)


@contextlib.contextmanager
def passing_over(problems: list[str]) -> Iterator[None]:
    """Add the message of a table that turns out to be damaged to ``problems``, and go on.

    Pages of a table are verified as they are read, long after its header: every loop that reads
    tables reads each of them in such a block, so that one damaged table does not end it.
    """
    try:
        yield
    except UnreadableTable as error:
        problems.append(str(error))


def has_equal_rows(table: SavedTable, other: SavedTable) -> bool:
    """Return whether two tables hold the same prompts with the same couplings, in one order.

    A table that is damaged in any column equals no other.
    """
    names = ("doc_hash", "prompt_hash", "prompt_index", "n_tokens", "coupling")
    texts = []
    for own in (table, other):
        try:
            columns = own.read_columns(own.columns, "all")
        except UnreadableTable:
            return False
        # As a text NaN is equal to NaN.
        texts.append(repr([columns[name].tolist() for name in names]))
    return texts[0] == texts[1]
