"""An open coupling table: its columns are verified by their checksums before they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.arrow_columns import to_columns
from lm_eval_coupling.saved.checksums import require_intact_chunks

_FEW_ROWS = 50  # read by one thread, because passing them to others takes longer


class UnreadableTable(CouplingError):
    """Raised for a table that is damaged or not one of ours; other tables can still be read."""


def damaged(file: Path, reason: str) -> str:
    """Return the sentence on a damaged table."""
    return f"got {file}, which is damaged ({reason}); copy it again or measure again"


class OpenTable:
    """One open file, read by columns.

    Args:
        file: where it lies.
        parquet: the same, open.
    """

    def __init__(self, file: Path, parquet: pq.ParquetFile) -> None:
        self.file = file
        self._parquet = parquet
        self._use_threads = parquet.metadata.num_rows > _FEW_ROWS
        self._verified: set[str] = set()

    def read(self, columns: Sequence[str] | None) -> dict[str, np.ndarray]:
        """Read columns, as far as the file has them; None for all.

        Returns:
            An array for each.

        Raises:
            UnreadableTable: if they are damaged, or ranks and values do not fit together.
        """
        with _refusing_damage(self.file):
            self._verify(columns)
            rows = self._parquet.read(columns, use_threads=self._use_threads)
            return _checked_columns(self.file, rows)

    def batches(self, columns: Sequence[str] | None, rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield columns of at most so many rows at a time; errors are those of :meth:`read`."""
        with _refusing_damage(self.file):
            self._verify(columns)
            for batch in self._parquet.iter_batches(
                rows, columns=columns, use_threads=self._use_threads
            ):
                yield _checked_columns(self.file, batch)

    def _verify(self, columns: Sequence[str] | None) -> None:
        names = self._parquet.schema_arrow.names if columns is None else columns
        if new := [name for name in names if name not in self._verified]:
            require_intact_chunks(self.file, self._parquet, new)
            self._verified.update(new)


@contextlib.contextmanager
def open_table(file: Path) -> Iterator[OpenTable]:
    """Open a table for reading.

    Yields:
        The table; errors in the block are its own.

    Raises:
        UnreadableTable: if it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        with _refusing_damage(file):
            parquet = stack.enter_context(open_parquet(file, page_checksum_verification=True))
        yield OpenTable(file, parquet)


@contextlib.contextmanager
def open_parquet(file: Path, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, also one whose path is no text that pyarrow can open."""
    try:
        str(file).encode("utf-8")
    except UnicodeEncodeError:  # of undecodable bytes, or under a locale that is not UTF-8
        with file.open("rb") as source, pq.ParquetFile(source, **options) as table:
            yield table
    else:
        with pq.ParquetFile(file, **options) as table:
            yield table


@contextlib.contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    """Raise UnreadableTable in place of the errors of reading a damaged file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UnreadableTable(damaged(file, why(error))) from None


def _checked_columns(file: Path, rows: pa.Table | pa.RecordBatch) -> dict[str, np.ndarray]:
    """Convert rows, and refuse those whose parts do not fit together, as no run writes them.

    Returns:
        An array for each column.

    Raises:
        UnreadableTable: if ranks are no distinct positive numbers, or values are not by rank.
    """
    columns = to_columns(rows)
    by_rank = [columns[name] for name in ("coupling", "normalized_miscoupling") if name in columns]
    for row, ranks in enumerate(columns.get("ranks", ())):
        fits = bool(ranks) and None not in ranks and min(ranks) > 0 and len({*ranks}) == len(ranks)
        values = [column[row] for column in by_rank if column[row] is not None]
        squares = [np.shape(value)[1:] for value in values if np.ndim(value) == 3]
        if (
            not fits
            or any(len(value) != len(ranks) for value in values)
            or any(height != width for height, width in squares)
        ):
            raise UnreadableTable(
                f"got {file} with ranks and values in row {row} that do not fit together, as no "
                "run writes them; copy it again or measure again"
            )
    return columns
