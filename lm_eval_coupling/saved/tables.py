"""The saved tables: one Parquet file per task beside lm-eval's results.

A row is one measured prompt: the document that it belongs to (``task, doc_id, doc_hash,
prompt_hash, prompt_index, kind, text, n_tokens``) and what was measured of it. Rows join with
``samples_*.jsonl`` on ``doc_hash``, never on ``doc_id``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.measures.formulas.headline import couplings_of
from lm_eval_coupling.measures.registry import (
    Column,
    measures_argument,
    record_columns,
    recording_option,
)
from lm_eval_coupling.saved.arrow_columns import arrow_type, to_arrow
from lm_eval_coupling.saved.atomic import writing
from lm_eval_coupling.saved.checksums import has_intact_footer, write_with_checksums
from lm_eval_coupling.saved.open_table import UnreadableTable, damaged, open_parquet

SCHEMA_VERSION = 1
METADATA_KEY = b"lm_eval_coupling"
TRAINED, UNTRAINED = "trained", "untrained"

# Columns that say which document a row is of, beside what was measured.
DOCUMENT = (
    Column("model", "", "name or path of the model", "text"),
    Column("task", "", "lm-eval's task", "text"),
    Column("doc_id", "", "lm-eval's number of the document", "whole"),
    Column("doc_hash", "", "lm-eval's hash of the document: join samples on it", "text"),
    Column("prompt_hash", "", "lm-eval's hash of the document's first prompt", "text"),
    Column("prompt_index", "", "number of the prompt among those of the document, from 0", "whole"),
    Column(
        "kind",
        "",
        "what the prompt is to the task: its context, a whole text, or the context with what "
        "follows it, measured in the part named: generated, reasoning, answer, target",
        "text",
    ),
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
# Further columns of rows at a token of a response or of a continuation.
RESPONSE = (
    Column(
        "part_index",
        "",
        "number of the measured token in the response or continuation, from 0",
        "whole",
    ),
    Column("part_length", "", "number of tokens of that response or continuation", "whole"),
    Column("token_text", "", "the measured token, decoded", "text"),
)
# Further columns of rows of images.
IMAGE = (
    Column(
        "picture",
        "",
        "the image, made anew with at most 160 pixels a side: PNG up to 64 of them, else JPEG",
        "bytes",
    ),
)


# Columns that readers take for granted; those of other measures may be missing.
_NEEDED = (
    *(column.name for column in DOCUMENT),
    *("ranks", "measures", "tokens", "position", "reason", "certificate"),
    *("normalized_miscoupling", "norms"),
)


def table_columns() -> dict[str, Column]:
    """Return every column of a table by name, in order: its document and what was measured."""
    return {column.name: column for column in DOCUMENT} | record_columns()


def write_tables(
    rows: Sequence[Mapping[str, Any]], folder: Path | str, date: str, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write ``coupling_<task>_<date>.parquet`` for each task, completely or not at all.

    Records of untrained weights go to ``untrained_coupling_<task>_<date>.parquet``, which the
    pattern ``coupling_*.parquet`` does not match, so that nobody averages over both by accident.
    Each column's meaning stands in the metadata of its field.

    Args:
        rows: the records.
        folder: where to; made if missing.
        date: lm-eval's date of the run, as in ``results_<date>.json``.
        provenance: JSON-able facts about model, settings and versions, for each file's metadata.

    Returns:
        The files, in the order in which their tasks first appear.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    files: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        files.setdefault((row["task"], row.get("weights") or TRAINED), []).append(
            {"model": provenance.get("model"), **row, "weights": row.get("weights") or TRAINED}
        )
    written = []
    for (task, weights), members in files.items():
        about = _provenance_of_task(provenance, task) | {
            "schema_version": SCHEMA_VERSION,
            "task": task,
            "date": date,
            "weights": weights,
        }
        prefix = "coupling" if weights == TRAINED else f"{weights}_coupling"
        path = Path(folder) / f"{prefix}_{safe_name(task)}_{date}.parquet"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CouplingError(
                f"got {folder} for the coupling tables, which cannot be written ({why(error)}); "
                "choose another"
            ) from None
        with writing(path) as temporary:
            metadata = {METADATA_KEY: json.dumps(about, default=str)}
            write_with_checksums(_table(members).replace_schema_metadata(metadata), temporary)
        written.append(path)
    return written


def _provenance_of_task(provenance: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the provenance with the summary of one task: those of a whole group are large."""
    about = dict(provenance)
    if "tasks" in about:
        about["tasks"] = {name: summary for name, summary in about["tasks"].items() if name == task}
    twins = {
        name: part for name, part in about.items() if isinstance(part, Mapping) and "tasks" in part
    }
    return about | {name: _provenance_of_task(part, task) for name, part in twins.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    rows = [
        dict(row) | {"coupling": couplings_of(row.get("normalized_miscoupling"))} for row in rows
    ]
    columns = table_columns()
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    columns |= {column.name: column for column in (*RESPONSE, *IMAGE)}
    types = {name: arrow_type(column) for name, column in columns.items()}
    arrays = [to_arrow([row.get(name) for row in rows], types.get(name)) for name in names]
    fields = [
        pa.field(name, array.type, metadata=_meaning(columns[name]) if name in columns else None)
        for name, array in zip(names, arrays, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _meaning(column: Column) -> dict[str, str]:
    return {"shape": f"[{', '.join(column.dimensions)}]", "description": column.doc}


def safe_name(task: str) -> str:
    """Return the task's name as part of a file name; changed names stay distinct by a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", task)
    if plain == task and len(task) <= 120:
        return task
    return f"{plain[:100]}-{hashlib.sha256(task.encode(errors='surrogatepass')).hexdigest()[:8]}"


class Header(NamedTuple):
    """What a table says of itself.

    Attributes:
        about: the metadata, as the run that made the table wrote it.
        columns: their names, in the order of the table.
        is_verified: whether it has our checksums; other software that wrote it again has none.
    """

    about: dict[str, Any]
    columns: tuple[str, ...]
    is_verified: bool


def read_header(file: Path) -> Header:
    """Read what a table says about the run that made it, and the names of its columns.

    Returns:
        The header; no row has been read.

    Raises:
        UnreadableTable: if it is damaged, or no table of ours.
        CouplingError: if it is of another schema version.
    """
    if not file.exists():  # it was removed since it was listed
        raise UnreadableTable(f"got {file}, which cannot be read (there is no such file)")
    intact, schema, about = None, None, None
    with contextlib.suppress(pa.ArrowException, OSError, KeyError, ValueError, RecursionError):
        intact = has_intact_footer(file)
        # Not `pq.read_schema`, which takes three times as long.
        with open_parquet(file) as table:
            schema = table.schema_arrow
        about = json.loads((schema.metadata or {})[METADATA_KEY])
    if schema is None or about is None:
        raise UnreadableTable(
            f"got {file}, which is not a coupling table; expected a file that a coupling-hf run "
            "wrote"
        )
    if intact is False:
        raise UnreadableTable(damaged(file, "its checksum differs"))
    types = dict(zip(schema.names, schema.types, strict=True))
    if not isinstance(about, dict):
        raise UnreadableTable(damaged(file, "its metadata is no mapping"))
    require_schema(file, about)
    if lacking := [name for name in _NEEDED if name not in types]:
        raise UnreadableTable(f"got {file} without the column {lacking[0]}; measure again")
    if len(types) < len(schema.names):
        twice = Counter(schema.names).most_common(1)[0][0]
        raise UnreadableTable(f"got {file} with two columns {twice}; measure again")
    for name, kind in _arrow_types(tuple(table_columns().values())).items():
        if types.get(name, kind) != kind:
            raise UnreadableTable(
                f"got {file} with {types[name]} in the column {name}, expected {kind}; measure "
                "again"
            )
    return Header(about, tuple(schema.names), is_verified=bool(intact))


@functools.cache
def _arrow_types(columns: tuple[Column, ...]) -> dict[str, pa.DataType]:
    return {column.name: arrow_type(column) for column in columns}


def require_schema(file: Path, about: Mapping[str, Any]) -> None:
    """Refuse a file that another release may have meant otherwise.

    Args:
        file: results or a table.
        about: what it says of its coupling.

    Raises:
        CouplingError: if it is of another schema version.
    """
    if (version := about.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise CouplingError(
            f"got {file} of schema version {version}, expected version {SCHEMA_VERSION}; "
            "read it with the release that wrote it or measure again"
        )


def require(
    records: pd.DataFrame, columns: Sequence[str], *, weights: str | None = None
) -> pd.DataFrame:
    """Return the records that have all of ``columns``, and these ``weights`` where given.

    Args:
        records: rows of tables.
        columns: each known in every row that is returned.
        weights: ``trained`` or ``untrained``.

    Returns:
        At least one row.

    Raises:
        CouplingError: if there is none; it names the option of a run that records what is missing.
    """
    if weights is not None:
        records = _require_rows(
            records[records["weights"] == weights], records, f"{weights} weights"
        )
    for column in columns:
        is_known = (
            [_is_known(value) for value in records[column]]
            if column in records
            else [False] * len(records)
        )
        records = _require_rows(records[is_known], records, column)
    return records


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _require_rows(kept: pd.DataFrame, records: pd.DataFrame, needed: str) -> pd.DataFrame:
    if len(kept):
        return kept
    tasks = ", ".join(map(str, records["task"].unique()[:5]))
    measures = dict.fromkeys(name for measured in records["measures"] for name in measured)
    option = recording_option(needed) or measures_argument([])
    if needed == "untrained weights":
        option = "coupling_untrained_seed=0"
    failed = "they failed: " if option == measures_argument([]) and "regularity" in measures else ""
    raise CouplingError(
        f"got {len(records)} records of {tasks} with the measures "
        f"{'+'.join(measures) or 'nothing'}, none with {needed}; "
        f"{failed}measure again with {option}"
    )
