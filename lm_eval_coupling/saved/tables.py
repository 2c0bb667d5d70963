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

from lm_eval_coupling.errors import CouplingError

SCHEMA_VERSION = 1
METADATA_KEY = b"lm_eval_coupling"
_GROUP = 64  # rows: whoever wants one document reads the matrices of so many


def _nested(depth: int) -> pa.DataType:
    return pa.float32() if depth == 0 else pa.list_(_nested(depth - 1))


COLUMNS: dict[str, pa.DataType] = {
    "task": pa.string(),
    "doc_id": pa.int64(),
    "doc_hash": pa.string(),
    "prompt_hash": pa.string(),
    "prompt_index": pa.int64(),
    "kind": pa.string(),
    "weights": pa.string(),
    "text": pa.string(),
    "coupling": pa.list_(pa.float64()),
    "n_tokens": pa.int64(),
    "tokens": pa.list_(pa.int64()),
    "position": pa.int64(),
    "ranks": pa.list_(pa.int64()),
    "measures": pa.list_(pa.string()),
    "normalized_miscoupling": _nested(3),
    "miscoupling": _nested(3),
    "miscoupling_to": _nested(3),
    "miscoupling_to_absolute": _nested(3),
    "miscoupling_to_trace": _nested(3),
    "miscoupling_to_vju": _nested(3),
    "miscoupling_to_absolute_vju": _nested(3),
    "subspace_overlap": _nested(4),
    "singular_values": _nested(2),
    "gap": _nested(2),
    "svd_residual": _nested(1),
    "certificate": _nested(1),
    "method": pa.list_(pa.string()),
    "line_shape_score": pa.float64(),
    "expodistance": pa.float64(),
    "norms": _nested(1),
    "line_shape_scores": _nested(1),
    "window": pa.int64(),
    "windowed_line_shape": _nested(1),
    "windowed_expodistance": _nested(1),
    "step_lengths": _nested(1),
    "equidistance": pa.float64(),
    "entropy": _nested(1),
    "trajectories": _nested(3),
    "trajectory_variance": _nested(1),
    "effective_rank": _nested(1),
    "participation_ratio": _nested(1),
    "frobenius_norms": _nested(2),
    "spectral_norms": _nested(2),
    "depth_slope": _nested(1),
    "depth_r2": _nested(1),
    "self_tokens": pa.list_(pa.int64()),
    "self_layers": pa.list_(pa.int64()),
    "self_miscoupling": _nested(5),
    "context_tokens": pa.list_(pa.int64()),
    "context_layers": pa.list_(pa.int64()),
    "context_input_miscoupling": _nested(5),
    "context_output_miscoupling": _nested(5),
    "seconds": pa.float64(),
    "reason": pa.string(),
}


def write_tables(
    rows: Sequence[Mapping[str, Any]], folder: Path | str, date: str, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write ``coupling_<task>_<date>.parquet`` for each task; a reader never sees half a file.

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
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    written = []
    for task, members in by_task.items():
        about = _of_one_task(provenance, task) | {"schema_version": SCHEMA_VERSION, "task": task, "date": date}
        path = Path(folder) / f"coupling_{_safe(task)}_{date}.parquet"
        table = _table(members).replace_schema_metadata({METADATA_KEY: json.dumps(about, default=str)})
        try:
            _write_atomically(table, path)
        except OSError as error:
            raise CouplingError(
                f"got {folder} for the coupling tables, which cannot be written ({error}); choose another"
            ) from None
        written.append(path)
    return written


def _of_one_task(provenance: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The provenance with the summary of this task alone: that of all of a group's tasks, in each one's file, is large."""
    about = dict(provenance)
    if "tasks" in about:
        about["tasks"] = {name: summary for name, summary in about["tasks"].items() if name == task}
    twins = {name: part for name, part in about.items() if isinstance(part, Mapping) and "tasks" in part}
    return about | {name: _of_one_task(part, task) for name, part in twins.items()}


def coupling_of(normalized_miscoupling: np.ndarray) -> float:
    """1 − the mean of m̃[layer, layer'] over different layers; NaN if nothing is defined."""
    different = ~np.eye(len(normalized_miscoupling), dtype=bool)
    known = normalized_miscoupling[different & ~np.isnan(normalized_miscoupling)].astype(np.float64)
    return 1 - float(known.mean()) if known.size else math.nan


def couplings_of(normalized_miscoupling: np.ndarray | None) -> list[float] | None:
    """:func:`coupling_of` at every rank, kept in the table so that nobody reads matrices for a mean."""
    return None if normalized_miscoupling is None else [coupling_of(matrix) for matrix in normalized_miscoupling]


_DEFAULT, _TOKENS = "coupling_measures=depth+regularity", ",coupling_tokens=last8"
_RECORDED_BY = {  # arguments of the model
    _DEFAULT: ("normalized_miscoupling", "singular_values", "line_shape_score", "expodistance", "norms")
    + ("windowed_line_shape", "windowed_expodistance", "step_lengths", "equidistance", "entropy"),
    f"{_DEFAULT}+spectra": ("effective_rank", "participation_ratio", "frobenius_norms", "spectral_norms")
    + ("depth_slope", "depth_r2"),
    f"{_DEFAULT}+self{_TOKENS}": ("self_miscoupling",),
    f"{_DEFAULT}+context{_TOKENS}": ("context_input_miscoupling", "context_output_miscoupling"),
    "coupling_trajectories=1": ("trajectories", "trajectory_variance"),
    "coupling_untrained=0": ("untrained weights",),
}


def require(records: pd.DataFrame, columns: Sequence[str], *, weights: str | None = None) -> pd.DataFrame:
    """The records that have all of ``columns``, and these ``weights`` (``trained`` or ``untrained``) where given.

    Raises:
        CouplingError: if there is none; it says which option of a run records what is missing.
    """
    if weights is not None:
        records = _some(records[records["weights"] == weights], records, f"{weights} weights")
    for column in columns:
        known = [_is_known(value) for value in records[column]] if column in records else [False] * len(records)
        records = _some(records[known], records, column)
    return records


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _some(kept: pd.DataFrame, records: pd.DataFrame, needed: str) -> pd.DataFrame:
    if len(kept):
        return kept
    tasks = ", ".join(map(str, records["task"].unique()[:5]))
    measures = list(dict.fromkeys(measure for measured in records["measures"] for measure in measured))
    option = next((option for option, columns in _RECORDED_BY.items() if needed in columns), _DEFAULT)
    older = "" if option != _DEFAULT or "regularity" not in measures else "an older release made them or they failed: "
    raise CouplingError(
        f"got {len(records)} records of {tasks} with the measures {'+'.join(measures) or 'nothing'}, none with {needed}; "
        f"{older}measure again with {option}"
    )


def open_table(file: Path) -> pq.ParquetFile:
    """A table for reading by columns and some rows at a time; close it, or use it in a ``with``.

    Raises:
        CouplingError: if it is not readable.
    """
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise CouplingError(f"got {file}, which cannot be read ({error}); copy it again or measure again") from None


def read_provenance(file: Path | str) -> dict[str, Any]:
    """What a table's metadata says about the run that made it.

    Raises:
        CouplingError: if it is not one of our tables, or of another schema version.
    """
    try:
        metadata = pq.read_schema(file).metadata or {}
        about = json.loads(metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise CouplingError(
            f"got {file}, which is not a coupling table; expected a file that a coupling-hf run wrote"
        ) from None
    if about["schema_version"] != SCHEMA_VERSION:
        raise CouplingError(
            f"got {file} of schema version {about['schema_version']}, expected version {SCHEMA_VERSION}; "
            "read it with the release that wrote it or measure again"
        )
    return about


def _safe(task: str) -> str:
    """Task name as part of a file name; names that had to be changed stay distinct by a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", task)
    if plain == task and len(task) <= 120:
        return task
    return f"{plain[:100]}-{hashlib.sha256(task.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _write_atomically(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace must not cross file systems
    try:
        with open(unfinished, "wb") as file:
            pq.write_table(table, file, compression="zstd", row_group_size=_GROUP)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    rows = [dict(row) | {"coupling": couplings_of(row.get("normalized_miscoupling"))} for row in rows]
    names = list(COLUMNS) + [name for name in rows[0] if name not in COLUMNS]
    return pa.table({name: _column([row.get(name) for row in rows], COLUMNS.get(name)) for name in names})


def _column(values: list[Any], kind: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    if arrays and (kind is None or _innermost(kind) == pa.float32()):
        # In parts, each with offsets of its own: those of a whole table may be more than 32 bits hold.
        parts = [values[first : first + _GROUP] for first in range(0, len(values), _GROUP)]
        return pa.chunked_array([_array_column(part, arrays[0].ndim) for part in parts])
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


def _array_column(values: list[np.ndarray | None], depth: int) -> pa.Array:
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
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


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
    return pd.Series([tuple(value) if isinstance(value, list) else value for value in column.to_pylist()], dtype=object)


def _arrays(column: pa.ListArray) -> Iterator[np.ndarray | None]:
    """Each row's array, cut out of the one buffer that holds them all; its shape from where every level's lists end."""
    ends, inner = [np.asarray(column.offsets)], column.values
    while pa.types.is_list(inner.type):
        ends.append(np.asarray(inner.offsets)[ends[-1]])
        inner = inner.values
    flat = inner.to_numpy(zero_copy_only=False)
    sizes = np.diff(ends)
    for row, valid in enumerate(column.is_valid().to_pylist()):
        counts = sizes[:, row]
        shape = [counts[0], *(size // count if count else 0 for count, size in zip(counts, counts[1:], strict=False))]
        yield np.array(flat[ends[-1][row] : ends[-1][row + 1]], dtype=np.float32).reshape(shape) if valid else None
