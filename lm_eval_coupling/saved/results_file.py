"""The typed reader of lm-eval's ``results_*.json``: what it returns has the shape that is read."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, shown, why
from lm_eval_coupling.saved.bounded import read_json
from lm_eval_coupling.saved.tables import require_schema

_NUMBER = "a number"
_TEXT = "a text"
_ANYTHING = "anything"


@dataclasses.dataclass(frozen=True)
class _Each:
    """The shape of a mapping of any names, whose members have one shape; null only if allowed."""

    member: Any
    nullable: bool = True


@dataclasses.dataclass(frozen=True)
class _ListOf:
    """The shape of a list of members of one shape."""

    member: Any


_SUMMARY = {
    "measured": _NUMBER,
    "failed": _NUMBER,
    "reasons": _Each(_ANYTHING),
    "measures": _Each("values of a measure", nullable=False),
}
# What is read of ``config.coupling``, and of a table's provenance. Other keys may be there.
COUPLING = {
    "run_id": _TEXT,
    "settings": {"ranks": _ListOf(_NUMBER), "measures": _ListOf(_TEXT)},
    "versions": _Each(_ANYTHING),
    "model": _TEXT,
    "revision": _TEXT,
    "fingerprint": _TEXT,
    "model_dtype": _TEXT,
    "date": _TEXT,
    "weights": _TEXT,
    "task": _TEXT,
    "headline_rank": _NUMBER,
    "worst_certificate": _NUMBER,
    "tasks": _Each(_SUMMARY, nullable=False),
    "untrained": {"seed": _NUMBER, "tasks": _Each(_SUMMARY, nullable=False)},
    "prompts": _Each(_ANYTHING),
} | dict.fromkeys(("n_params", "n_layers", "d_model", "n_heads", "vocab_size"), _NUMBER)
RESULTS = {
    "results": _Each(_Each(_ANYTHING), nullable=False),
    "group_subtasks": _Each(_ListOf(_TEXT)),
    "configs": _Each({"output_type": _TEXT}),
    "higher_is_better": _Each(_Each(_ANYTHING)),
    "config": {"coupling": COUPLING},
    "model_name": _TEXT,
    "chat_template_sha": _TEXT,
    "lm_eval_version": _TEXT,
} | dict.fromkeys(("versions", "n-shot", "n-samples", "task_hashes"), _Each(_ANYTHING))


def read_results(file: Path) -> dict[str, Any]:
    """Read a results file of lm-eval.

    Returns:
        Its content; every part that is read has the shape that lm-eval gives it, or is null.

    Raises:
        CouplingError: if it cannot be read, is not of lm-eval's shape, or its coupling is of
            another schema version.
    """
    try:
        run = read_json(file)
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, which is no readable results file ({why(error)}); remove it or run the "
            "evaluation again"
        ) from None
    if not isinstance(run, dict) or not isinstance(run.get("results"), dict):
        raise CouplingError(
            f"got {file}, which has no results; expected a results_*.json that lm-eval wrote"
        )
    require_shape(file, run, RESULTS)
    if coupling := (run.get("config") or {}).get("coupling"):
        require_schema(file, coupling)
    return run


def require_shape(file: Path, value: Any, shape: Any) -> None:
    """Raise CouplingError, which names the file and the place, if ``value`` has another shape."""
    try:
        _check(value, shape, "")
    except _Misshapen as error:
        place, wrong, expected = error.args
        raise CouplingError(
            f"got {file} with {place.lstrip('.')} = {shown(wrong)}, expected {expected}; it is not "
            "as a run wrote it: copy it again or run the evaluation again"
        ) from None


class _Misshapen(Exception):
    """Raised with the place, the wrong value, and what was expected there."""


def _check(value: Any, shape: Any, place: str) -> None:
    if shape == "values of a measure":
        _check_measure(value, place)
    elif isinstance(shape, str):
        kind = {_NUMBER: int | float, _TEXT: str, _ANYTHING: object}[shape]
        if not isinstance(value, kind) or (shape == _NUMBER and isinstance(value, bool)):
            raise _Misshapen(place, value, shape)
    elif isinstance(shape, _ListOf):
        if not isinstance(value, list):
            raise _Misshapen(place, value, "a list")
        for number, member in enumerate(value):
            _check(member, shape.member, f"{place}[{number}]")
    elif not isinstance(value, dict):  # parsed JSON; Mapping takes three times as long
        raise _Misshapen(place, value, "a mapping")
    elif isinstance(shape, _Each):
        for name, member in value.items():
            if member is not None or not shape.nullable:
                _check(member, shape.member, f"{place}.{name}")
    else:
        for name, inner in shape.items():
            if value.get(name) is not None:
                _check(value[name], inner, f"{place}.{name}")


def _check_measure(measure: Any, place: str) -> None:
    """Check mean, stderr and n of a measure, or these by rank; each may be null."""
    value = dict.fromkeys(("mean", "stderr", "n"), _NUMBER)
    if not isinstance(measure, dict):
        raise _Misshapen(place, measure, "a mapping")
    for rank, values in {"": measure}.items() if "mean" in measure else measure.items():
        if rank and not re.fullmatch("[1-9][0-9]{0,8}", rank):
            raise _Misshapen(place, rank, "a rank")
        if not (isinstance(values, dict) and value.keys() <= values.keys()):
            raise _Misshapen(f"{place}.{rank}", values, "mean, stderr and n")
        _check(values, value, f"{place}.{rank}")


def number(value: Any) -> float:
    """Return a number as a float; NaN for null, a truth value or a text such as "N/A"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
