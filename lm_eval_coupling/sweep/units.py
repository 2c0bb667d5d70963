"""Units of work of a plan: one model at one revision, evaluated on all tasks."""

from __future__ import annotations

import datetime
import difflib
import glob
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, nearest, path, shown
from lm_eval_coupling.saved.fact_types import FACTS, is_name, typed_fact
from lm_eval_coupling.sweep import yaml12
from lm_eval_coupling.sweep.fields import Fields, is_whole
from lm_eval_coupling.sweep.plan_secrets import secret_in, secrets_in

_OTHER_NAMES = {
    "tokens": "training_tokens",
    "release": "released",
    "release_date": "released",
    "params": "n_params",
}
_COLUMNS = (
    *("model", "revision", "task", "alias", "group", "metric", "date", "file", "dtype"),
    *("fingerprint", "step", "lineage"),
)
_TOKEN_ARGUMENTS = ("token", "use_auth_token", "hf_token")
_MAX_LABEL = 150


@dataclass(frozen=True)
class Task:
    """Task or group as lm-eval names it.

    Attributes:
        name: its name.
        num_fewshot: number of examples where the plan gives one.
        evaluation: state of the logged evaluation that it is measured from, if it is not scored.
    """

    name: str
    num_fewshot: int | None = None
    evaluation: str | None = None

    @property
    def asked(self) -> int | str | None:
        """Value that results record of the task besides its name."""
        return self.num_fewshot if self.evaluation is None else self.evaluation


@dataclass(frozen=True)
class Evaluation:
    """Logged evaluation of a model: lm-eval's file of results, and its tasks with samples."""

    file: Path
    tasks: tuple[Task, ...]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Model at one revision, which is one run of lm-eval, or one of measuring from samples."""

    model: str
    revision: str = "main"
    arguments: Mapping[str, Any]
    facts: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def name(self) -> str:
        """Readable name of the unit's folder, which depends on model, revision and args alone."""
        identity = json.dumps(
            [self.model, self.revision, self.arguments], sort_keys=True, default=str
        )
        label = re.sub(r"[^A-Za-z0-9._@+-]+", "--", self.label)[-_MAX_LABEL:]
        return f"{label}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    @property
    def label(self) -> str:
        """Name for people: the last two parts of the model's, and the revision if not main."""
        end = "/".join(re.split(r"[\\/]+", self.model.rstrip("\\/"))[-2:]).lstrip("/.")
        return end if self.revision == "main" else f"{end}@{self.revision}"


def read_units(fields: Fields) -> tuple[list[Unit], set[str]]:
    """Read the units of a plan in its order and note problems in ``fields``.

    Returns:
        The units, and the access tokens among their arguments, which are left out of these.
    """
    units: list[Unit] = []
    tokens: set[str] = set()
    for number, item in enumerate(fields.items("models", "a list of models")):
        entry = {"model": item} if isinstance(item, str) else item
        units += _units_of(entry, f"models[{number}]", fields.problems, tokens)
    names: set[str] = set()
    for unit in units:
        if unit.name in names:
            fields.problems.append(
                f"got the model {unit.model} at revision {unit.revision} twice; name it once"
            )
        names.add(unit.name)
    return units, tokens


def _units_of(item: Any, where: str, problems: list[str], tokens: set[str]) -> list[Unit]:
    fields = Fields(item, where, ["model", "revisions", "args", "facts"], problems)
    model = fields.need("model", is_name, "a name on the hub or a folder, on one line")
    arguments, facts = _arguments(fields, tokens), _facts(fields, "facts")
    revisions = _revisions(fields)
    return [
        Unit(model=name, revision=revision, arguments=arguments, facts=facts | own_facts)
        for name in (_models(model, fields) if model else [])
        for revision, own_facts in revisions.items()
    ]


def _models(model: str, fields: Fields) -> list[str]:
    """Return the model, or the folders of a pattern such as ``training/checkpoint-*``.

    Brackets may belong to a folder's name, as in ``runs/lr[0.1]/checkpoint-*``: a folder that
    exists under that name goes before the pattern.
    """
    if model.startswith("~"):
        try:
            model = str(path(fields.at("model"), model))
        except CouplingError as error:
            fields.problems.append(str(error))
            return []
    if Path(model).is_dir():
        return [model.rstrip("/") or model]  # With a slash it would be another unit.
    if not glob.has_magic(model):
        return [model]
    for pattern in (re.sub(r"\[", "[[]", model), model):
        folders = [name for name in glob.glob(pattern) if (Path(name) / "config.json").is_file()]
        if folders:
            return sorted(folders, key=_by_number)
    fields.refuse("model", "a pattern of folders with a config.json; there is none")
    return []


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which checkpoint-9 comes before checkpoint-10."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _revisions(fields: Fields) -> dict[str, dict[str, Any]]:
    """Return the facts of each revision's own, by revision."""
    value = fields.values.get("revisions")
    if value is None:
        return {"main": {}}
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = [(item, None) for item in (value if isinstance(value, list) else [value])]
    facts = {str(name): facts for name, facts in pairs if is_name(name) or is_whole(name)}
    if not facts or len(facts) != len(pairs):
        expected = "a list of different texts, such as [step1000, step143000]"
        fields.refuse("revisions", f"{expected}; put numbers in quotes")
        return {"main": {}}
    own = Fields(facts, fields.at("revisions"), [*facts], fields.problems)
    return {revision: _facts(own, revision) for revision in facts}


def _arguments(fields: Fields, tokens: set[str]) -> dict[str, Any]:
    """Return the model's further arguments, from a mapping or from lm-eval's ``a=1,b=2``.

    lm-eval copies arguments to its results. An access token goes to ``tokens`` instead, and any
    other secret is refused.
    """
    value = fields.values.get("args")
    if value is None:
        return {}
    if isinstance(value, str) and all("=" in part for part in _split(value)):
        pairs = [part.partition("=") for part in _split(value)]
        names = [name.strip() for name, _, _ in pairs]
        fields.problems += [
            f"got {name} twice in {fields.at('args')}, expected it once"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        value = {name.strip(): _value(text) for name, _, text in pairs}
    if not isinstance(value, Mapping) or not all(map(is_name, value)):
        fields.refuse("args", "name=value,name=value or a mapping")
        return {}
    for name, instead in (
        ("pretrained", "model"),
        ("revision", "revisions"),
        ("coupling_out", "nothing"),
    ):
        if name in value:
            fields.problems.append(f"got {name} among {fields.at('args')}; use {instead}")
    arguments = {}
    for name, argument in value.items():
        if name in _TOKEN_ARGUMENTS and (token := secret_in(name, argument)):
            tokens.add(token)
            continue
        fields.problems += wrong_value(f"{fields.at('args')}.{name}", name, argument)
        arguments[name] = plain(argument)
    return arguments


def wrong_value(place: str, name: str, value: Any) -> list[str]:
    """Return what rules out a value that lm-eval copies to its results, as sentences."""
    problems = []
    if any(secrets_in(value, name)):
        problems.append(
            f"got a secret as {place}, which lm-eval would write to its results; "
            "give it as a variable of run.environment, such as HF_TOKEN"
        )
    if _has_no_finite(value):  # NaN never equals itself: such results would never count.
        problems.append(f"got {place}: {shown(value)}, expected finite numbers")
    return problems


def _has_no_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_no_finite, value.values()))
    if isinstance(value, list):
        return any(map(_has_no_finite, value))
    return isinstance(value, float) and not math.isfinite(value)


def plain(value: Any) -> Any:
    """Return a value of a plan with its dates as text; only facts have a use for dates."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def _split(text: str) -> list[str]:
    """Split a text at the commas that stand in no bracket."""
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
    except Exception:  # Anything that is no YAML is a text.
        return text


def _facts(fields: Fields, key: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    given = fields.values.get(key)
    if given is None:
        return facts
    if not isinstance(given, Mapping):
        fields.refuse(key, "a mapping of facts, such as {family: pythia, training_tokens: 300e9}")
        return facts
    for name, value in given.items():
        place = f"{fields.at(key)}.{name if is_name(name) else shown(name)}"
        if not is_name(name) or name in _COLUMNS or "," in name or "@" in name:
            fields.problems.append(f"got {place}, which results have themselves; use another name")
        elif name not in FACTS and (meant := _meant_fact(name)):
            fields.problems.append(f"got {place}, did you mean {meant}?")
        else:
            try:
                facts[name] = None if value is None else typed_fact(name, value)
            except ValueError as error:
                fields.problems.append(f"got {place}: {shown(value)}, expected {error}")
    return facts


def _meant_fact(name: str) -> str | None:
    """Return the known fact that a name misspells or paraphrases, or None."""
    name = re.sub(r"[\s-]+", "_", name[:100].strip().lower())
    meant = _OTHER_NAMES.get(name) or nearest(name, [*FACTS])
    is_close = difflib.SequenceMatcher(None, name, meant).ratio() > 0.8
    return meant if is_close or name in _OTHER_NAMES else None
