"""Columns of records as Arrow arrays, and back: nested float32 lists from and to NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.registry import Column

ROW_GROUP = 64  # rows; reading one document decodes the matrices of so many
_MOST = 2**31 - 1  # numbers of one nested array, whose offsets have 32 bits
_KINDS = {
    "number": pa.float32(),
    "double": pa.float64(),
    "whole": pa.int64(),
    "text": pa.string(),
    "bytes": pa.binary(),
}


def arrow_type(column: Column) -> pa.DataType:
    """Return a column's type: a single number is float64, arrays are nested lists of float32."""
    kind = _KINDS["double" if column.kind == "number" and not column.shape else column.kind]
    for _ in column.dimensions:
        kind = pa.list_(kind)
    return kind


def to_arrow(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array | pa.ChunkedArray:
    """Convert a column's values; None becomes null and NaN stays NaN.

    Args:
        values: one per row.
        kind: the column's type; inferred where it is None.

    Returns:
        As many values; in chunks where they are arrays.
    """
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    if arrays and (kind is None or _innermost(kind) == pa.float32()):
        return pa.chunked_array([_nested(part, arrays[0].ndim) for part in _parts(values)])
    plain = [v.tolist() if isinstance(v, np.ndarray | np.generic) else v for v in values]
    # Not `from_pandas=True`, which would make NaN a null.
    return pa.array([_encodable(v) for v in plain], type=kind, from_pandas=False)


def to_columns(table: pa.Table | pa.RecordBatch) -> dict[str, np.ndarray]:
    """Convert rows: nested float32 lists to arrays, other lists to tuples, null to None."""
    return {name: _values(table.column(name)) for name in table.schema.names}


def frame_of_columns(columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Make a frame whose columns of objects stay such: pandas would make texts of its own."""
    return pd.DataFrame({name: pd.Series(v, dtype=v.dtype) for name, v in columns.items()})


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which have no UTF-8: better one character lost than the table."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _innermost(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind):
        kind = kind.value_type
    return kind


def _parts(values: Sequence[np.ndarray | None]) -> Iterator[Sequence[np.ndarray | None]]:
    """Cut the rows into parts whose offsets fit into 32 bits each."""
    sizes = np.cumsum([0 if value is None else value.size for value in values])
    first = 0
    while first < len(values):
        before = sizes[first - 1] if first else 0
        fitting = int(np.searchsorted(sizes, before + _MOST, side="right"))
        after = min(max(fitting, first + 1), first + ROW_GROUP)
        yield values[first:after]
        first = after


def _nested(values: Sequence[np.ndarray | None], depth: int) -> pa.Array:
    """Build nested float32 lists from one flat buffer; None becomes null."""
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
            f"got {ends[-1]} numbers in one cell of a table, at most {_MOST} fit; measure fewer "
            "coupling_tokens"
        )
    return pa.array(ends.astype(np.int32))


def _values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_list(kind) and _innermost(kind) == pa.float32():
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        return _objects([value for chunk in chunks for value in _arrays(chunk)])
    if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and not column.null_count):
        copied = isinstance(column, pa.Array)  # a chunked array is copied in any case
        return column.to_numpy(zero_copy_only=False) if copied else column.to_numpy()
    return _objects([tuple(v) if isinstance(v, list) else v for v in column.to_pylist()])


def _objects(values: Sequence[Any]) -> np.ndarray:
    """Return a one-dimensional array of objects, whatever their shapes."""
    return np.fromiter(values, dtype=object, count=len(values))


def _arrays(column: pa.ListArray) -> Iterator[np.ndarray | None]:
    """Yield the array of each row, cut out of the one buffer that holds them all."""
    # `ends[level]` is where every row's part ends in the flat list of that level.
    ends, inner = [np.asarray(column.offsets)], column.values
    while pa.types.is_list(inner.type):
        ends.append(np.asarray(inner.offsets)[ends[-1]])
        inner = inner.values
    flat = inner.to_numpy(zero_copy_only=False)
    sizes = np.diff(ends)
    is_uniform = len(column) and not column.null_count and (sizes == sizes[:, :1]).all()
    if is_uniform:  # as in nearly every table: one reshape for all rows
        numbers = np.array(flat[ends[-1][0] : ends[-1][-1]], dtype=np.float32)
        yield from numbers.reshape(len(column), *_shape(sizes[:, 0].tolist()))
        return
    for row, valid in enumerate(column.is_valid().to_pylist()):
        numbers = np.array(flat[ends[-1][row] : ends[-1][row + 1]], dtype=np.float32)
        yield numbers.reshape(_shape(sizes[:, row].tolist())) if valid else None


def _shape(sizes: Sequence[int]) -> list[int]:
    """Return the shape of one row's array from the sizes of its flat lists at every level."""
    inner = zip(sizes, sizes[1:], strict=False)
    return [sizes[0], *(after // before if before else 0 for before, after in inner)]
