"""Checksums over every bit of a Parquet file, of its column chunks and of its footer.

A damaged table is refused where it would otherwise give other numbers. Parquet's own checksums of
pages do not cover the pages' headers, where one flipped bit can cut values off without an error.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lm_eval_coupling.saved.arrow_columns import ROW_GROUP

# Metadata of checksums: of the footer its length and CRC-32, and the CRC-32 of every column chunk.
_FOOTER_KEY, _CHUNKS_KEY = "lm_eval_coupling_footer", "lm_eval_coupling_chunks"
_UNSUMMED = b"length=0000000000,crc32=00000000"  # while the checksum is computed
_BUFFER = 2**16  # bytes: chunks of short tables are small and lie side by side
_FOOTER_CHECKSUM = re.compile(rb"length=(\d{10}),crc32=[0-9a-f]{8}")


def write_with_checksums(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet, and put the checksums into the place that was kept for them."""
    no_chunks = "chunks=" + "0" * (8 * len(table.schema) * -(-len(table) // ROW_GROUP))
    with (
        path.open("wb") as sink,  # pyarrow opens no path that is no text in UTF-8
        pq.ParquetWriter(
            sink, table.schema, compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        writer.write_table(table, row_group_size=ROW_GROUP)
        writer.add_key_value_metadata({_FOOTER_KEY: _UNSUMMED.decode(), _CHUNKS_KEY: no_chunks})
    with path.open("rb+") as file:
        start, footer = _read_footer(file)
        sums = _chunk_checksums(file, pq.read_metadata(file))
        chunks = b"chunks=" + b"".join(b"%08x" % sums[key] for key in sorted(sums))
        if len(chunks) == len(no_chunks):  # not of a further column that holds several
            footer = footer.replace(no_chunks.encode(), chunks)
        file.seek(start)
        file.write(footer.replace(_UNSUMMED, _checksum(footer)))


def _chunk_checksums(
    file: Any, metadata: pq.FileMetaData, columns: Sequence[str] | None = None
) -> dict[tuple[int, int], int]:
    """Compute the CRC-32 of column chunks, by the numbers of row group and column."""
    sums = {}
    for column in range(metadata.num_columns):
        name = metadata.schema.column(column).path.split(".")[0]
        for group in range(metadata.num_row_groups) if columns is None or name in columns else ():
            chunk = metadata.row_group(group).column(column)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page:
                start = min(start, chunk.dictionary_page_offset)
            file.seek(start)
            sums[group, column] = zlib.crc32(file.read(chunk.total_compressed_size))
    return sums


def require_intact_chunks(path: Path, table: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    """Raise OSError if a chunk of these columns is not as it was written."""
    metadata = table.metadata
    written = (metadata.metadata or {}).get(_CHUNKS_KEY.encode(), b"").removeprefix(b"chunks=")
    is_complete = len(written) == 8 * metadata.num_row_groups * metadata.num_columns
    if not is_complete or not written.strip(b"0") or _checked_footer(path) is None:
        return
    with path.open("rb", buffering=_BUFFER) as file:
        for (group, column), checksum in _chunk_checksums(file, metadata, columns).items():
            place = 8 * (group * metadata.num_columns + column)
            if b"%08x" % checksum != written[place : place + 8]:
                name = metadata.schema.column(column).path.split(".")[0]
                raise OSError(f"the checksum of its column {name} differs")


def _read_footer(file: Any) -> tuple[int, bytes]:
    """Return where the footer of an open Parquet file starts, and its bytes to the file's end."""
    file.seek(-8, 2)
    end = file.tell()
    length = int.from_bytes(file.read(4), "little")
    start = max(0, end - length)
    file.seek(start)
    return start, file.read()


def _checksum(footer: bytes) -> bytes:
    return b"length=%010d,crc32=%08x" % (len(footer), zlib.crc32(footer))


def _checked_footer(path: Path) -> tuple[bytes, bytes] | None:
    """Return the footer and the checksum in it, or None if other software wrote the file.

    Its footer has another length than ours, whose checksum it may have copied, says.
    """
    with path.open("rb") as file:
        _, footer = _read_footer(file)
    match = _FOOTER_CHECKSUM.search(footer)
    return (footer, match[0]) if match and int(match[1]) == len(footer) else None


def has_intact_footer(path: Path) -> bool | None:
    """Return whether the footer is as it was written; None if other software wrote it."""
    if (checked := _checked_footer(path)) is None:
        return None
    footer, checksum = checked
    return _checksum(footer.replace(checksum, _UNSUMMED)) == checksum
