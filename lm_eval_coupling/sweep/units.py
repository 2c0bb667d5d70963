"""Units of work: one model at one revision, with all tasks. A unit's name depends on nothing but the unit."""

from __future__ import annotations

import datetime
import glob
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import nearest
from lm_eval_coupling.sweep import yaml12
from lm_eval_coupling.sweep.fields import Fields, is_text, is_whole

# The facts that `fit` knows; any other name is a column of its own.
FACTS = (
    "family",
    "tuned",
    "training_tokens",
    "released",
    "n_params",
    "n_layers",
    "d_model",
    "n_heads",
    "vocab_size",
)
_MEANT = {
    "tokens": "training_tokens",
    "release": "released",
    "release_date": "released",
    "params": "n_params",
}
_COLUMNS = (
    "model",
    "revision",
    "task",
    "alias",
    "group",
    "metric",
    "date",
    "file",
    "dtype",
    "fingerprint",
    "step",
    "lineage",
)


@dataclass(frozen=True)
class Task:
    """A task or group as lm-eval names it, with its number of examples where the plan gives one."""

    name: str
    num_fewshot: int | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One model at one revision: one run of lm-eval."""

    model: str
    revision: str = "main"
    arguments: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder: readable, and the same for ever."""
        asked = json.dumps([self.model, self.revision, self.arguments], sort_keys=True, default=str)
        return f"{_safe(self.label)}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    @property
    def label(self) -> str:
        """A name for people: the end of the model's, with the revision if it is not main."""
        end = "/".join(re.split(r"[\\/]+", self.model.rstrip("\\/"))[-2:]).lstrip("/.")
        return end if self.revision == "main" else f"{end}@{self.revision}"


def read_units(fields: Fields) -> list[Unit]:
    """The units of a plan, in its order; problems are noted in ``fields``."""
    given = fields.need(
        "models", lambda v: is_text(v) or (isinstance(v, list) and bool(v)), "a list of models"
    )
    units: list[Unit] = []
    for number, item in enumerate([given] if is_text(given) else given or []):
        units += _units_of(
            {"model": item} if is_text(item) else item, f"models[{number}]", fields.problems
        )
    seen: set[str] = set()
    for unit in units:
        if unit.name in seen:
            fields.problems.append(
                f"got the model {unit.model} at revision {unit.revision} twice; name it once"
            )
        seen.add(unit.name)
    return units


def _units_of(item: Any, where: str, problems: list[str]) -> list[Unit]:
    fields = Fields(item, where, ["model", "revisions", "args", "facts"], problems)
    model = fields.need("model", is_text, "a name on the hub or a folder")
    arguments, facts = _arguments(fields), _facts(fields, "facts")
    revisions = _revisions(fields)
    return [
        Unit(model=name, revision=revision, arguments=arguments, facts=facts | own)
        for name in (_models(model, fields) if model else [])
        for revision, own in revisions.items()
    ]


def _models(model: str, fields: Fields) -> list[str]:
    """The model itself, or the folders that a pattern such as ``training/checkpoint-*`` names, in order of their numbers."""
    if not glob.has_magic(model):
        return [model]
    found = [folder for folder in glob.glob(model) if (Path(folder) / "config.json").is_file()]
    if not found:
        fields.refuse("model", "a pattern of folders with a config.json; there is none")
    return sorted(
        found,
        key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
        ],
    )


def _revisions(fields: Fields) -> dict[str, dict[str, Any]]:
    """Revision → facts of its own."""
    given = fields.values.get("revisions")
    if given is None:
        return {"main": {}}
    pairs = (
        given.items()
        if isinstance(given, Mapping)
        else [(revision, None) for revision in _listed(given)]
    )
    named = {
        str(revision): facts for revision, facts in pairs if is_text(revision) or is_whole(revision)
    }
    if not named or len(named) != len(pairs):
        fields.refuse(
            "revisions",
            "a list of different texts, such as [step1000, step143000]; put numbers in quotes",
        )
        return {"main": {}}
    own = Fields(named, fields.at("revisions"), [*named], fields.problems)
    return {revision: _facts(own, revision) for revision in named}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _arguments(fields: Fields) -> dict[str, Any]:
    """Further arguments of the model, from a mapping or from lm-eval's own ``a=1,b=2``."""
    given = fields.values.get("args")
    if given is None:
        return {}
    if is_text(given):
        parts = _split(given)
        if any("=" not in part for part in parts):
            fields.refuse("args", "name=value,name=value or a mapping")
            return {}
        given = {
            name.strip(): _value(value)
            for name, _, value in (part.partition("=") for part in parts)
        }
    if not isinstance(given, Mapping) or not all(map(is_text, given)):
        fields.refuse("args", "name=value,name=value or a mapping")
        return {}
    for name, instead in (
        ("pretrained", "model"),
        ("revision", "revisions"),
        ("coupling_out", "nothing"),
    ):
        if name in given:
            fields.problems.append(f"got {name} among {fields.at('args')}; use {instead}")
    return dict(given)


def _split(text: str) -> list[str]:
    """At commas that no bracket holds."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    if text.strip() == "None":
        return None
    try:
        return yaml12.load(text)
    except Exception:  # any text is a value
        return text


def _facts(fields: Fields, key: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = fields.values.get(key)
    if given is None:
        return found
    if not isinstance(given, Mapping):
        fields.refuse(key, "a mapping of facts, such as {family: pythia, training_tokens: 300e9}")
        return found
    for name, value in given.items():
        place = f"{fields.at(key)}.{name}"
        if not is_text(name) or name in _COLUMNS or "," in name or "@" in name:
            fields.problems.append(f"got {place}, which results have themselves; use another name")
        elif name in _MEANT:
            fields.problems.append(f"got {place}, did you mean {_MEANT[name]}?")
        elif name not in FACTS and _alike(name):
            fields.problems.append(f"got {place}, did you mean {nearest(name, [*FACTS])}?")
        elif isinstance(value, Mapping | list) or (name in FACTS[2:] and isinstance(value, str)):
            fields.problems.append(
                f"got {place}: {value!r}, expected a number" + " or a date" * (name == "released")
            )
        else:
            found[name] = _year(value) if isinstance(value, datetime.date) else value
    return found


def _alike(name: str) -> bool:
    """A slip of the pen of a known fact."""
    import difflib

    return difflib.SequenceMatcher(None, name, nearest(name, [*FACTS])).ratio() > 0.8


def _year(day: datetime.date) -> float:
    """A date as a number that regressions can use: 2023-07-01 is 2023.496."""
    first, next_first = datetime.date(day.year, 1, 1), datetime.date(day.year + 1, 1, 1)
    return round(day.year + (day - first).days / (next_first - first).days, 3)


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._@+-]+", "--", text)
