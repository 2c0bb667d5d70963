"""The saved tables: one Parquet file per task beside lm-eval's results, and how they are read.

A record is one row per measured prompt: which document it belongs to (``task, doc_id, doc_hash, prompt_hash,
prompt_index, kind, text, n_tokens``) and what was measured of it. Rows join with ``samples_*.jsonl`` on ``doc_hash``,
never on ``doc_id``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.measures.formulas.headline import couplings_of
from lm_eval_coupling.measures.registry import (
    Column,
    measures_argument,
    record_columns,
    recording_option,
)

SCHEMA_VERSION = 1
METADATA_KEY = b"lm_eval_coupling"
TRAINED, UNTRAINED = "trained", "untrained"
_GROUP = 64  # rows: whoever wants one document reads the matrices of so many
_MOST = 2**31 - 1  # numbers of one nested array: its offsets have 32 bits


# What is known of a row beside what was measured.
DOCUMENT = (
    Column("model", "", "name or path of the model", "text"),
    Column("task", "", "lm-eval's task", "text"),
    Column("doc_id", "", "lm-eval's number of the document", "whole"),
    Column("doc_hash", "", "lm-eval's hash of the document: join samples on it", "text"),
    Column("prompt_hash", "", "lm-eval's hash of the document's first prompt", "text"),
    Column("prompt_index", "", "number of the prompt among those of the document, from 0", "whole"),
    Column("kind", "", "what the prompt is to the task: its context, or a whole text", "text"),
    Column("weights", "", "trained, or untrained for the twin of coupling_untrained", "text"),
    Column(
        "reused",
        "",
        "1 if an earlier run of the same weights and software had measured it, else 0",
        "whole",
    ),
    Column(
        "place",
        "",
        "number of the measured token among those of coupling_position; values of a run are of 0",
        "whole",
    ),
    Column("text", "", "the prompt, decoded from its tokens", "text"),
    Column(
        "coupling",
        "rank",
        "1 − mean of m̃ over different layers: kept so that nobody reads matrices for it",
        "double",
    ),
    Column("n_tokens", "", "number of tokens of the prompt", "whole"),
)
# What rows of images have besides.
IMAGE = (
    Column(
        "picture",
        "",
        "the image, made anew with at most 160 pixels a side: PNG up to 64 of them, else JPEG",
        "bytes",
    ),
)
_KINDS = {
    "number": pa.float32(),
    "double": pa.float64(),
    "whole": pa.int64(),
    "text": pa.string(),
    "bytes": pa.binary(),
}


def table_columns() -> dict[str, Column]:
    """Every column of a table, in order: which document it belongs to and what was measured of it."""
    return {column.name: column for column in DOCUMENT} | record_columns()


def arrow_type(column: Column) -> pa.DataType:
    """Numbers are float64 alone and float32 in arrays, which are nested lists."""
    kind = _KINDS["double" if column.kind == "number" and not column.shape else column.kind]
    for _ in column.dimensions:
        kind = pa.list_(kind)
    return kind


def write_tables(
    rows: Sequence[Mapping[str, Any]], folder: Path | str, date: str, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write ``coupling_<task>_<date>.parquet`` for each task; a reader never sees half a file.

    What was measured of untrained weights goes to ``untrained_coupling_<task>_<date>.parquet``, which ``coupling_*.parquet``
    does not find, so that nobody averages over both by accident. Each column's meaning stands in the metadata of its field.

    Args:
        rows: the records.
        folder: where to; made if missing.
        date: lm-eval's date of the run, as in ``results_<date>.json``.
        provenance: JSON-able facts about model, settings and versions, kept in each file's metadata.

    Returns:
        The files, in the order in which their tasks first appear.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    files: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        files.setdefault((row["task"], row.get("weights") or TRAINED), []).append(
            {"model": provenance.get("model"), **row}
        )
    written = []
    for (task, weights), members in files.items():
        about = _of_one_task(provenance, task) | {
            "schema_version": SCHEMA_VERSION,
            "task": task,
            "date": date,
        }
        about |= {"weights": weights}
        kind = "coupling" if weights == TRAINED else f"{weights}_coupling"
        path = Path(folder) / f"{kind}_{safe_name(task)}_{date}.parquet"
        table = _table(members).replace_schema_metadata(
            {METADATA_KEY: json.dumps(about, default=str)}
        )
        try:
            _write_atomically(table, path)
        except OSError as error:
            raise CouplingError(
                f"got {folder} for the coupling tables, which cannot be written ({why(error)}); choose another"
            ) from None
        written.append(path)
    return written


def _of_one_task(provenance: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The provenance with the summary of this task alone: that of all of a group's tasks, in each one's file, is large."""
    about = dict(provenance)
    if "tasks" in about:
        about["tasks"] = {name: summary for name, summary in about["tasks"].items() if name == task}
    twins = {
        name: part for name, part in about.items() if isinstance(part, Mapping) and "tasks" in part
    }
    return about | {name: _of_one_task(part, task) for name, part in twins.items()}


def require(
    records: pd.DataFrame, columns: Sequence[str], *, weights: str | None = None
) -> pd.DataFrame:
    """The records that have all of ``columns``, and these ``weights`` (``trained`` or ``untrained``) where given.

    Returns:
        At least one row.

    Raises:
        CouplingError: if there is none; it says which option of a run records what is missing.
    """
    if weights is not None:
        records = _some(records[records["weights"] == weights], records, f"{weights} weights")
    for column in columns:
        known = (
            [_is_known(value) for value in records[column]]
            if column in records
            else [False] * len(records)
        )
        records = _some(records[known], records, column)
    return records


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _some(kept: pd.DataFrame, records: pd.DataFrame, needed: str) -> pd.DataFrame:
    if len(kept):
        return kept
    tasks = ", ".join(map(str, records["task"].unique()[:5]))
    measures = list(
        dict.fromkeys(measure for measured in records["measures"] for measure in measured)
    )
    option = (
        "coupling_untrained=0"
        if needed == "untrained weights"
        else recording_option(needed) or measures_argument([])
    )
    older = (
        ""
        if option != measures_argument([]) or "regularity" not in measures
        else "an older release made them or they failed: "
    )
    raise CouplingError(
        f"got {len(records)} records of {tasks} with the measures {'+'.join(measures) or 'nothing'}, none with {needed}; "
        f"{older}measure again with {option}"
    )


def open_table(file: Path) -> pq.ParquetFile:
    """A table for reading by columns and some rows at a time; close it, or use it in a ``with``.

    Returns:
        The open file.

    Raises:
        CouplingError: if it is not readable.
    """
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise CouplingError(
            f"got {file}, which cannot be read ({why(error)}); copy it again or measure again"
        ) from None


def read_header(file: Path | str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a table's metadata says about the run that made it, and the names of its columns.

    Returns:
        The metadata as it was written, and the names in the order of the table.

    Raises:
        CouplingError: if it is not one of our tables, or of another schema version.
    """
    try:
        schema = pq.read_schema(file)
        about = json.loads((schema.metadata or {})[METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise CouplingError(
            f"got {file}, which is not a coupling table; expected a file that a coupling-hf run wrote"
        ) from None
    require_schema(file, about)
    return about, tuple(schema.names)


def require_schema(file: Path | str, about: Mapping[str, Any]) -> None:
    """Refuse what another release may have meant otherwise: ``about`` is what a file says of its coupling.

    Raises:
        CouplingError: if it is of another schema version.
    """
    if (version := about.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise CouplingError(
            f"got {file} of schema version {version}, expected version {SCHEMA_VERSION}; "
            "read it with the release that wrote it or measure again"
        )


def safe_name(task: str) -> str:
    """Task name as part of a file name; names that had to be changed stay distinct by a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", task)
    if plain == task and len(task) <= 120:
        return task
    return f"{plain[:100]}-{hashlib.sha256(task.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _write_atomically(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # same folder: os.replace must not cross file systems
    try:
        with open(unfinished, "wb") as file:
            pq.write_table(table, file, compression="zstd", row_group_size=_GROUP)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    rows = [
        dict(row) | {"coupling": couplings_of(row.get("normalized_miscoupling"))} for row in rows
    ]
    known = table_columns()
    names = list(known) + [name for name in rows[0] if name not in known]
    known |= {column.name: column for column in IMAGE}
    kinds = {name: arrow_type(column) for name, column in known.items()}
    arrays = [_column([row.get(name) for row in rows], kinds.get(name)) for name in names]
    fields = [
        pa.field(name, array.type, metadata=_field_metadata(known[name]) if name in known else None)
        for name, array in zip(names, arrays, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _field_metadata(column: Column) -> dict[str, str]:
    return {"shape": f"[{', '.join(column.dimensions)}]", "description": column.doc}


def _column(values: list[Any], kind: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    if arrays and (kind is None or _innermost(kind) == pa.float32()):
        return pa.chunked_array([_array_column(part, arrays[0].ndim) for part in _parts(values)])
    plain = [v.tolist() if isinstance(v, np.ndarray | np.generic) else v for v in values]
    # from_pandas=False: NaN is a value, not a missing one
    return pa.array([_encodable(v) for v in plain], type=kind, from_pandas=False)


def _encodable(value: Any) -> Any:
    """A lone surrogate has no UTF-8; a table that cannot be written would cost more than that character."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _innermost(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind):
        kind = kind.value_type
    return kind


def _parts(values: Sequence[np.ndarray | None]) -> Iterator[Sequence[np.ndarray | None]]:
    """Rows to write together, each part with offsets of its own: those of a whole table may be more than 32 bits hold."""
    sizes = np.cumsum([0 if value is None else value.size for value in values])
    first = 0
    while first < len(values):
        before = sizes[first - 1] if first else 0
        fitting = int(np.searchsorted(sizes, before + _MOST, side="right"))
        after = min(max(fitting, first + 1), first + _GROUP)
        yield values[first:after]
        first = after


def _array_column(values: Sequence[np.ndarray | None], depth: int) -> pa.Array:
    """Nested float32 lists, built from one flat buffer; ``None`` becomes null."""
    shapes = [(0,) * depth if v is None else v.shape for v in values]
    flat = [np.asarray(v, np.float32).ravel() for v in values if v is not None]
    nested: pa.Array = pa.array(np.concatenate([np.empty(0, np.float32), *flat]), from_pandas=False)
    for level in reversed(range(1, depth)):
        sizes = [np.full(math.prod(shape[:level]), shape[level]) for shape in shapes]
        nested = pa.ListArray.from_arrays(_offsets(np.concatenate(sizes)), nested)
    missing = pa.array([v is None for v in values])
    return pa.ListArray.from_arrays(_offsets([shape[0] for shape in shapes]), nested, mask=missing)


def _offsets(sizes: Any) -> pa.Array:
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if ends[-1] > _MOST:
        raise CouplingError(
            f"got {ends[-1]} numbers in one cell of a table, at most {_MOST} fit; measure fewer coupling_tokens"
        )
    return pa.array(ends.astype(np.int32))


def frame_of(table: pa.Table | pa.RecordBatch) -> pd.DataFrame:
    """Rows in pandas: nested float32 lists as arrays, other lists as tuples; what is missing is None."""
    return pd.DataFrame({name: _series(table.column(name)) for name in table.schema.names})


def _series(column: pa.Array | pa.ChunkedArray) -> pd.Series:
    kind = column.type
    if pa.types.is_list(kind) and _innermost(kind) == pa.float32():
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        return pd.Series([value for chunk in chunks for value in _arrays(chunk)], dtype=object)
    if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and not column.null_count):
        return column.to_pandas()
    return pd.Series(
        [tuple(value) if isinstance(value, list) else value for value in column.to_pylist()],
        dtype=object,
    )


def _arrays(column: pa.ListArray) -> Iterator[np.ndarray | None]:
    """Each row's array, cut out of the one buffer that holds them all; its shape from where every level's lists end."""
    ends, inner = [np.asarray(column.offsets)], column.values
    while pa.types.is_list(inner.type):
        ends.append(np.asarray(inner.offsets)[ends[-1]])
        inner = inner.values
    flat = inner.to_numpy(zero_copy_only=False)
    sizes = np.diff(ends)
    if (
        len(column) and not column.null_count and (sizes == sizes[:, :1]).all()
    ):  # as in nearly every table
        numbers = np.array(flat[ends[-1][0] : ends[-1][-1]], dtype=np.float32)
        yield from numbers.reshape(len(column), *_shape(sizes[:, 0].tolist()))
        return
    for row, valid in enumerate(column.is_valid().to_pylist()):
        numbers = np.array(flat[ends[-1][row] : ends[-1][row + 1]], dtype=np.float32)
        yield numbers.reshape(_shape(sizes[:, row].tolist())) if valid else None


def _shape(counts: Sequence[int]) -> list[int]:
    """Of one row's array, from the numbers of lists at every level and of values."""
    return [
        counts[0],
        *(size // count if count else 0 for count, size in zip(counts, counts[1:], strict=False)),
    ]
