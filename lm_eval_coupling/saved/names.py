"""How runs are called, and what is known of their models: family, tuned or not, training step, from name or CSV file."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.prompting import differing

logger = logging.getLogger("lm_eval.coupling")

FACTS = (
    "family",
    "tuned",
    "training_tokens",
    "n_params",
    "n_layers",
    "d_model",
    "n_heads",
    "vocab_size",
)

_SIZE = re.compile(
    r"(?<![a-z0-9.])(?:(?:\d+x)?\d+(?:[._]\d+)?[kmb]|nano|tiny|mini|small|base|medium|large|x+l)(?![a-z0-9])"
)
_TUNED = re.compile(
    r"(?<![a-z])(?:instruct|chat|it|sft|dpo|ppo|rlhf|orpo|tuned|aligned|assistant)(?![a-z])"
)
_LOCAL = re.compile(r"[./~\\]|[A-Za-z]:[\\/]")
_STEP = re.compile(r"(?:global_?step|step|iter|checkpoint|ckpt)[-_]?(\d+)")
_TOKENS = re.compile(r"tokens[-_]?(\d+(?:\.\d+)?)([mbt])")


def short_name(model: str) -> str:
    """The last part of a hub name or a path."""
    return _parts(model)[-1]


def labels(models: Iterable[str]) -> dict[str, str]:
    """By model, the shortest end of its name, in whole parts, that no other one's has: ``b/base`` beside ``/x/a/base``.

    A checkpoint's folder is told by its training, without which it says nothing: ``pythia/checkpoint-1000``.

    Returns:
        One label per model, by its name.
    """
    lineages = {model: facts_from_name(model, "main")["lineage"] for model in models}
    parts = {lineage: _parts(lineage) for lineage in lineages.values()}
    names = {
        lineage: "/".join(_own_end(own, {*parts.values()} - {own}))
        for lineage, own in parts.items()
    }
    return {
        model: names[of] if of == model else f"{names[of]}/{short_name(model)}"
        for model, of in lineages.items()
    }


def full_names(models: Iterable[str]) -> dict[str, str]:
    """By model, its whole name on the hub; of a local folder only as much as tells it from the others."""
    return {
        model: label if _LOCAL.match(model) else model for model, label in labels(models).items()
    }


def ends_with(model: str, end: str) -> bool:
    """Whether the last parts of a model's name are these, as they are of a model and its label."""
    parts = _parts(end)
    return _parts(model)[-len(parts) :] == parts


def run_label(name: str, revision: str | None) -> str:
    """The label of a model with its revision, if that is not main."""
    return name if revision in (None, "main") else f"{name}@{revision}"


def label_rows(rows: pd.DataFrame, names: Mapping[str, str] | None = None) -> pd.Series:
    """What tells each row from the others of its task: model, revision, and no more than is needed of the rest.

    Args:
        rows: ``model, revision, variant, fingerprint, prompting, task``; unknown is None.
        names: of the models; by default :func:`labels`.

    Returns:
        Labels such as ``pythia-410m@step1000``, ``base (5-shot)``, ``base #3f9a01bc``: the same for all rows of the same
        weights, but for what the prompts of one task are told apart by.
    """
    weights = pd.Series(
        map(run_label, label_weights(rows, names), rows["revision"]), rows.index, dtype=object
    )
    prints = rows["fingerprint"].map(
        lambda digest: f"#{digest[:8]}" if isinstance(digest, str) else ""
    )
    weights = _told_apart(weights, prints, [weights], " {}")
    prompting = rows["prompting"].fillna("")
    for _, of in prompting.groupby([weights, rows["task"]]):
        prompting[of.index] = of.map(differing(of.unique()))
    return _told_apart(weights, prompting, [weights, rows["task"]], " ({})")


def label_weights(rows: pd.DataFrame, names: Mapping[str, str] | None = None) -> pd.Series:
    """The part of :func:`label_rows` that names the model: of ``model`` and ``variant``, no more than is needed."""
    short = rows["model"].map(names or labels(rows["model"].unique()))
    return _told_apart(short, rows["variant"].fillna(""), [short], " [{}]")


def _told_apart(names: pd.Series, more: pd.Series, within: list[pd.Series], form: str) -> pd.Series:
    """``names`` with ``more`` where rows of one name (and task) differ in it."""
    several = (
        more.where(more != "").groupby(within).transform("nunique")
        + (more == "").groupby(within).transform("any")
        > 1
    )
    return names.where(~several | (more == ""), names + more.map(form.format))


def _parts(model: str) -> tuple[str, ...]:
    """A path from the root starts with an empty part, which tells it from a relative one."""
    return tuple(re.split(r"[\\/]", model.rstrip("\\/")))


def _own_end(own: tuple[str, ...], others: set[tuple[str, ...]]) -> tuple[str, ...]:
    return next(
        own[-n:] for n in itertools.count(1) if own[-n:] not in {other[-n:] for other in others}
    )


def facts_from_name(model: str, revision: str) -> dict[str, Any]:
    """What the names say: ``family`` (before the size), ``tuned``, ``lineage`` (whose checkpoint it is), ``step``.

    ``EleutherAI/pythia-410m`` at ``step1000`` is step 1000 of the lineage of that name; so is a local folder
    ``pythia/checkpoint-1000``, of the lineage ``pythia``. Names of other habits are for the CSV file.

    Returns:
        These by name and the ``training_tokens`` of the revision's, NaN where they say nothing of them.
    """
    lineage, checkpoint = model, _STEP.search(revision.lower())
    folder, _, name = model.rstrip("\\/").replace("\\", "/").rpartition("/")
    if folder and (inside := _STEP.fullmatch(name.lower())):
        lineage, checkpoint = folder, inside
    name = short_name(lineage).lower()
    size = _SIZE.search(name)
    family = (
        _TUNED.sub("", name[: size.start()] if size and size.start() else name).strip("-_. ")
        or name
    )
    tokens = _TOKENS.search(revision.lower())
    return {
        "family": family,
        "tuned": bool(_TUNED.search(name)),
        "lineage": lineage,
        "step": float(checkpoint[1]) if checkpoint else math.nan,
        "training_tokens": float(tokens[1]) * {"m": 1e6, "b": 1e9, "t": 1e12}[tokens[2]]
        if tokens
        else math.nan,
    }


def facts_beside(results: Path) -> dict[str, Any]:
    """What ``facts.json`` in the folder of results, or in the one above it, says of their model; empty without one.

    A sweep writes what its plan tells of a model there: ``family, tuned, training_tokens``, sizes, and columns of its own.

    Returns:
        Facts by name, as they were written.
    """
    for folder in (results.parent, results.parent.parent):
        try:
            found = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found if isinstance(found, dict) else {}
    return {}


def add_facts(runs: pd.DataFrame, file: Path | str) -> pd.DataFrame:
    """``runs`` with the facts of a CSV file: a column ``model``, perhaps ``revision``, and any others.

    A row counts for the model of that name, or of that last part of its name. The file's word on family, tuned,
    training_tokens and sizes goes before what the run says; its other columns are added.

    Returns:
        As many rows, in their order.

    Raises:
        CouplingError: if the file cannot be read, names a model twice or ambiguously, or has a column of results.
    """
    facts = _read(file)
    if taken := [
        name for name in facts if name in runs and name not in ("model", "revision", *FACTS)
    ]:
        raise CouplingError(
            f"got {file} with a column {taken[0]!r}, which the runs have themselves; rename it"
        )
    by_model = {
        key: row for key, row in zip(_keys(facts, file), facts.to_dict("records"), strict=True)
    }
    _require_clear({model for model, _ in by_model}, set(runs["model"]), file)
    found = [
        _lookup(by_model, model, revision)
        for model, revision in zip(runs["model"], runs["revision"], strict=True)
    ]
    if (
        unknown := {model for model, _ in by_model}
        - set(runs["model"])
        - set(map(short_name, runs["model"]))
    ):
        there = _some(runs["model"])
        logger.warning(
            "%s has facts of %s, of which there is no run; the runs are of %s",
            file,
            _some(unknown),
            there,
        )
    runs = runs.copy()
    for name in facts.columns.drop(["model", "revision"], errors="ignore"):
        told = pd.Series([row.get(name) for row in found], index=runs.index)
        if told.isna().all() and pd.api.types.is_numeric_dtype(facts[name]):
            told = told.astype(float)  # of nothing but None it is a column of objects
        runs[name] = told.where(told.notna(), runs[name]) if name in runs else told
    return runs


def _read(file: Path | str) -> pd.DataFrame:
    try:
        facts = pd.read_csv(file, dtype={"model": str, "revision": str})
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, which is no readable CSV file of facts ({why(error)})"
        ) from None
    if "model" not in facts:
        raise CouplingError(
            f"got {file} with the columns {', '.join(facts)}, expected one named model"
        )
    for name in [name for name in FACTS[2:] if name in facts]:
        if not pd.api.types.is_numeric_dtype(facts[name]):
            raise CouplingError(
                f"got {file} with words in the column {name}, expected numbers such as 3e11"
            )
    if "tuned" in facts:
        words = {
            "true": True,
            "1": True,
            "1.0": True,
            "yes": True,
            "false": False,
            "0": False,
            "0.0": False,
            "no": False,
        }
        facts["tuned"] = facts["tuned"].astype(str).str.lower().map(words).astype(object)
    return facts


def _keys(facts: pd.DataFrame, file: Path | str) -> list[tuple[str, str | None]]:
    revisions = facts["revision"] if "revision" in facts else [None] * len(facts)
    revisions = [revision if isinstance(revision, str) else None for revision in revisions]
    keys = list(zip(facts["model"], revisions, strict=True))
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise CouplingError(
            f"got {file} with {twice[0][0]} more than once, expected one row for each model"
        )
    return keys


def _require_clear(named: set[str], models: set[str], file: Path | str) -> None:
    for short in named - models:
        if len(meant := sorted(model for model in models if short_name(model) == short)) > 1:
            raise CouplingError(
                f"got {short} in {file}, which may be {' or '.join(meant)}; give the full name"
            )


def _lookup(
    by_model: Mapping[tuple[str, str | None], dict[str, Any]], model: str, revision: str
) -> dict[str, Any]:
    keys = [(name, at) for name in (model, short_name(model)) for at in (revision, None)]
    return next((by_model[key] for key in keys if key in by_model), {})


def _some(names: Iterable[str]) -> str:
    known = sorted(set(names))
    return ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
