"""Facts about models that no run knows: read from a CSV file, or from ``facts.json`` of a sweep."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, shown, why
from lm_eval_coupling.saved.bounded import read_json
from lm_eval_coupling.saved.csv_file import CsvFile, plain_name, read_csv
from lm_eval_coupling.saved.fact_types import FACTS, typed_fact
from lm_eval_coupling.saved.names import short_name

logger = logging.getLogger("lm_eval.coupling")

# Columns of runs that facts may correct; `step` and `lineage` order checkpoints.
_CORRECTABLE = ("model", "revision", "step", "lineage", *FACTS)
# Columns that `fit` makes of a run's, and others that no fact may stand for.
_RESERVED = re.compile(
    r"log10_\w+|label|score|score_of|score_error|turned|metric|mean_of|other_tasks_\w+"
    r"|gold_answer_\w+|bits_per_byte"
    r"|.*[,@].*"  # a metric of lm-eval, or a measure at a rank
)


def facts_beside(results: Path) -> dict[str, Any]:
    """Read ``facts.json`` in the folder of results, or in the one above it.

    A sweep writes there what its plan says of the model.

    Returns:
        Facts by name; empty without a file. A fact of a wrong type is left out with a warning.
    """
    for folder in (results.parent, results.parent.parent):
        file = folder / "facts.json"
        if not file.is_file():
            continue
        try:
            facts = read_json(file)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and was left out", file, why(error))
            continue
        if not isinstance(facts, dict):
            logger.warning("%s is no JSON object and was left out", file)
            return {}
        typed = {name: _typed(name, value) for name, value in facts.items()}
        for name in [name for name in facts if typed[name] is None and facts[name] is not None]:
            logger.warning("%s has %s = %s, which was left out", file, name, shown(facts[name]))
        return {name: value for name, value in typed.items() if value is not None}
    return {}


def _typed(name: str, value: Any) -> Any:
    """Return a fact in the type that its name asks for, None where it has another."""
    try:
        return None if value is None or _RESERVED.fullmatch(name) else typed_fact(name, value)
    except ValueError:
        return None


def add_facts(runs: pd.DataFrame, file: Path | str) -> pd.DataFrame:
    """Add the facts of a CSV file: a column ``model``, perhaps ``revision``, and any others.

    A row counts for the model of that name, or of that last part of its name. A value for family,
    tuned, training_tokens, step and sizes replaces the run's; other columns are added.

    Returns:
        As many rows, in their order.

    Raises:
        CouplingError: if the file cannot be read, names a model twice or ambiguously, has a value
            of a wrong type, or a column of results.
    """
    table = read_csv(file, ["model"], "facts")
    facts, names = _columns(table, set(runs.columns))
    by_model = {
        key: {name: values[position] for name, values in facts.items()}
        for position, key in enumerate(_keys(table, names))
    }
    named = {model for model, _ in by_model}
    _require_unambiguous(named, set(runs["model"]), file)
    rows = [
        _lookup(by_model, model, revision)
        for model, revision in zip(runs["model"], runs["revision"], strict=True)
    ]
    if unknown := named - set(runs["model"]) - set(map(short_name, runs["model"])):
        logger.warning(
            "%s has facts of %s, of which there is no run; the runs are of %s",
            file,
            _some(unknown),
            _some(runs["model"]),
        )
    runs = runs.copy()
    for name, values in facts.items():
        column = pd.Series([row.get(name) for row in rows], index=runs.index)
        if all(isinstance(value, float) for value in values):
            column = column.astype(float)  # a column of nothing but None would hold objects
        runs[name] = column.where(column.notna(), runs[name]) if name in runs else column
    return runs


def _columns(table: CsvFile, of_runs: set[str]) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return the typed columns of facts by name, and the file's name of ``model, revision``."""
    correctable = {plain_name(name): name for name in _CORRECTABLE}
    names: dict[str, str] = {}
    for column in table.columns:
        name = correctable.get(plain_name(column), column)
        if name in names:
            raise CouplingError(
                f"got {table.file} with two columns {name}, {names[name]!r} and {column!r}, "
                "expected one"
            )
        names[name] = column
    facts: dict[str, list[Any]] = {}
    for name, column in names.items():
        if name in ("model", "revision"):
            continue
        if (name in of_runs and name not in _CORRECTABLE) or _RESERVED.fullmatch(name):
            raise CouplingError(
                f"got {table.file} with a column {name!r}, which the runs have themselves, or the "
                "tables made of them; rename it"
            )
        if name in _CORRECTABLE:
            facts[name] = table.facts(column, name)
        else:
            facts[name] = list(table.values(column))
    return facts, names


def _keys(table: CsvFile, names: Mapping[str, str]) -> list[tuple[str, str | None]]:
    models = table.texts(names["model"])
    revisions = table.texts(names["revision"]) if "revision" in names else [None] * len(table.rows)
    keys: list[tuple[str, str | None]] = []
    seen: dict[tuple[str, str | None], int] = {}
    for position, (model, revision) in enumerate(zip(models, revisions, strict=True)):
        line = table.lines[position]
        if model is None:
            raise CouplingError(f"got {table.file} without a model in the row of line {line}")
        if (model, revision) in seen:
            raise CouplingError(
                f"got {table.file} with {model} more than once (lines {seen[model, revision]} and "
                f"{line}), expected one row for each model"
            )
        seen[model, revision] = line
        keys.append((model, revision))
    return keys


def _require_unambiguous(named: set[str], models: set[str], file: Path | str) -> None:
    for short in sorted(named - models):
        if len(meant := sorted(model for model in models if short_name(model) == short)) > 1:
            raise CouplingError(
                f"got {short} in {file}, which may be {' or '.join(meant)}; give the full name"
            )
        if named.intersection(meant):
            raise CouplingError(
                f"got {short} and {meant[0]} in {file}, which name one model; give one of both"
            )


def _lookup(
    by_model: Mapping[tuple[str, str | None], dict[str, Any]], model: str, revision: str
) -> dict[str, Any]:
    keys = [(name, at) for name in (model, short_name(model)) for at in (revision, None)]
    return next((by_model[key] for key in keys if key in by_model), {})


def _some(names: Iterable[str]) -> str:
    each = sorted(set(names))
    return ", ".join(each[:5]) + (f" and {len(each) - 5} more" if len(each) > 5 else "")
