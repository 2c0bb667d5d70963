"""Labels of runs, and what the names of models and revisions say: family, tuning, training step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from lm_eval_coupling.saved.prompting import differing

_SIZE = re.compile(
    r"(?<![a-z0-9.])(?:(?:\d+x)?\d+(?:[._]\d+)?[kmb]|\d+b\d"
    r"|nano|tiny|mini|small|base|medium|large|x+l)"
    r"(?![a-z0-9])"
)
_TUNED = re.compile(
    r"(?<![a-z])(?:instruct|chat|it|sft|dpo|ppo|rlhf|orpo|tuned|aligned|assistant)(?![a-z])"
)
_LOCAL = re.compile(r"[./~\\]|[A-Za-z]:[\\/]")
# A number with its unit, which no further digit, letter or separator of digits follows.
_STEP = re.compile(
    r"(?<![a-z])(?:global_?step|step|iter|epoch|checkpoint|ckpt)[-_]?"
    r"(\d+(?:\.\d+)?)([kmb]?)(?![a-z0-9]|[.,_']\d)"
)
_ENDS_WITH_STEP = re.compile(rf"(?P<training>.+?)[-_.](?P<step>{_STEP.pattern})", re.IGNORECASE)
_TOKENS = re.compile(r"(?<![a-z])tokens[-_]?(\d+(?:\.\d+)?)([kmbt])(?![a-z0-9])")
_LATER_STAGE = re.compile(
    r"(?<![a-z])(?:(?:stage|phase)[-_]?0*(?:[2-9]|[1-9]\d)|ingredient[-_]?\d*"
    r"|anneal|cooldown|decay)(?![0-9])"
)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def short_name(model: str) -> str:
    """Return the last part of a hub name or a path."""
    return _parts(model)[-1]


def labels(models: Iterable[str]) -> dict[str, str]:
    """Map each model to the shortest end of its name that no other one's has.

    Ends are of whole parts: ``b/base`` beside ``/x/a/base``. A checkpoint's folder, which says
    nothing alone, is named with its training: ``pythia/checkpoint-1000``.

    Returns:
        One label per model, by its name.
    """
    lineages = {model: facts_from_name(model, "main")["lineage"] for model in models}
    parts = {lineage: _parts(lineage) for lineage in lineages.values()}
    count: dict[tuple[str, ...], int] = {}
    for own in {*parts.values()}:
        for n in range(1, len(own) + 1):
            count[own[-n:]] = count.get(own[-n:], 0) + 1
    names = {lineage: "/".join(_own_end(own, count)) for lineage, own in parts.items()}
    return {
        model: names[of] if of == model else f"{names[of]}/{short_name(model)}"
        for model, of in lineages.items()
    }


def full_names(models: Iterable[str]) -> dict[str, str]:
    """Map each model to its name on the hub; a local folder's name is shortened."""
    return {
        model: label if _LOCAL.match(model) else model for model, label in labels(models).items()
    }


def ends_with(model: str, end: str) -> bool:
    """Return whether the last parts of a model's name are these."""
    parts = _parts(end)
    return _parts(model)[-len(parts) :] == parts


def run_label(name: str, revision: str | None) -> str:
    """Return the label of a model with its revision, if that is not main."""
    return name if revision in (None, "main") else f"{name}@{revision}"


def label_rows(rows: pd.DataFrame, names: Mapping[str, str] | None = None) -> pd.Series:
    """Label each row by model and revision, and by what else tells it from rows of that name.

    Variant, dtype and fingerprint are added where rows of one name differ in them, whatever the
    task. The prompting is added where rows of one name and one task differ in it.

    Args:
        rows: ``model, revision, variant, fingerprint, prompting, task``, perhaps ``dtype``; None
            where unknown.
        names: name to show for each model; by default :func:`labels`.

    Returns:
        One label per row, such as ``pythia-410m@step1000``, ``base (5-shot)`` or
        ``base #3f9a01bc``.
    """
    weights = pd.Series(
        map(run_label, label_weights(rows, names), rows["revision"]), rows.index, dtype=object
    )
    prints = rows["fingerprint"].map(
        lambda digest: f"#{digest[:8]}" if isinstance(digest, str) else ""
    )
    weights = _told_apart(weights, prints, [weights], " {}")
    return _with_prompting(weights, rows)


def label_trainings(rows: pd.DataFrame) -> pd.Series:
    """Label the training that each checkpoint belongs to.

    Checkpoints that were run with other arguments (``variant``), in another ``dtype`` or with other
    prompts are of another curve. So are those whose revisions differ in more than step and tokens,
    such as ``seed1-step1000`` and ``seed2-step1000``.

    Args:
        rows: ``lineage, revision, variant, dtype, prompting, task`` of checkpoints.

    Returns:
        Labels such as ``pythia-410m``, ``pythia-410m [dtype=float16]``, ``pythia-410m (5-shot)``.
    """
    lineages = rows.assign(model=rows["lineage"])
    names = label_weights(lineages, labels(rows["lineage"].unique()))
    names = _told_apart(names, rows["revision"].map(_beside_step), [rows["lineage"]], " [{}]")
    return _with_prompting(names, rows)


def is_checkpoint(revision: str) -> bool:
    """Return whether a revision is named by a step, which may be of a later stage of training."""
    return _STEP.search(revision.lower()) is not None


def _beside_step(revision: str) -> str:
    """Return what the revision of a checkpoint says besides step and tokens, such as ``seed2``."""
    rest = _TOKENS.sub("", _STEP.sub("", revision.lower()))
    return "-".join(re.findall(r"[^-_./\s]+", rest)) if is_checkpoint(revision) else ""


def label_weights(rows: pd.DataFrame, names: Mapping[str, str] | None = None) -> pd.Series:
    """Label each row by ``model``, and by ``variant`` and ``dtype`` where one name has several."""
    short = rows["model"].map(names or labels(rows["model"].unique()))
    named = _told_apart(short, rows["variant"].fillna(""), [short], " [{}]")
    if "dtype" not in rows:
        return named
    return _told_apart(named, rows["dtype"].fillna("").astype(object), [named], " [{}]", False)


def _with_prompting(names: pd.Series, rows: pd.DataFrame) -> pd.Series:
    prompting = rows["prompting"].fillna("")
    if len(prompting.unique()) < 2:
        return names
    place = [names, rows["task"]]
    is_several = prompting.groupby(place).transform("nunique") > 1
    prompting = prompting.where(is_several, "")  # most tasks need no group of their own
    for _, of in prompting[is_several].groupby([keys[is_several] for keys in place]):
        prompting[of.index] = of.map(differing(of.unique()))
    return _told_apart(names, prompting, place, " ({})")


def _told_apart(
    names: pd.Series,
    more: pd.Series,
    within: list[pd.Series],
    form: str,
    from_unknown: bool = True,
) -> pd.Series:
    """Return names with ``more`` added, within each group that has several values of it.

    Args:
        names: one name per row.
        more: one text per row, "" where unknown; such rows keep their name.
        within: keys of the groups.
        form: format of what is added, such as ``" ({})"``.
        from_unknown: whether unknown counts as one more value.
    """
    if len(more.unique()) < 2:
        return names
    several = more.where(more != "").groupby(within).transform("nunique")
    if from_unknown:
        several += (more == "").groupby(within).transform("any")
    return names.where(~(several > 1) | (more == ""), names + more.map(form.format))


def _parts(model: str) -> tuple[str, ...]:
    # A path from the root starts with an empty part, which tells it from a relative one.
    return tuple(re.split(r"[\\/]", model.rstrip("\\/")))


def _own_end(own: tuple[str, ...], count: Mapping[tuple[str, ...], int]) -> tuple[str, ...]:
    """Return the shortest end of a name's parts that only one name has."""
    ends = (own[-n:] for n in range(1, len(own) + 1))
    return next((end for end in ends if count[end] == 1), own)


def facts_from_name(model: str, revision: str) -> dict[str, Any]:
    """Read what the names of a model and its revision say.

    ``EleutherAI/pythia-410m`` at ``step1000`` is step 1000 of the lineage of that name. So is a
    local folder ``pythia/checkpoint-1000``, of the lineage ``pythia``, and ``me/run-epoch3`` is of
    ``me/run``. Steps and tokens of a
    later stage of training start anew from an unknown number, and are unknown. Other names are
    for a file of facts.

    Returns:
        ``family`` (the name before the size), ``tuned``, ``lineage`` (the training of a
        checkpoint), ``step`` and ``training_tokens``, NaN where the names do not say.
    """
    lineage, checkpoint = model, _STEP.search(revision.lower())
    folder, _, name = model.rstrip("\\/").replace("\\", "/").rpartition("/")
    if folder and (inside := _STEP.fullmatch(name.lower())):
        lineage, checkpoint = folder, inside
    elif checkpoint is None and (ending := _ENDS_WITH_STEP.fullmatch(name)):
        lineage = "/".join(filter(None, [folder, ending["training"]]))
        checkpoint = _STEP.fullmatch(ending["step"].lower())
    name = short_name(lineage).lower()
    size = _SIZE.search(name)
    before_size = name[: size.start()] if size and size.start() else name
    tokens = _TOKENS.search(revision.lower())
    if _LATER_STAGE.search(revision.lower()):
        checkpoint = tokens = None
    return {
        "family": _TUNED.sub("", before_size).strip("-_. ") or name,
        "tuned": bool(_TUNED.search(name)),
        "lineage": lineage,
        "step": float(checkpoint[1]) * _UNITS[checkpoint[2]] if checkpoint else math.nan,
        "training_tokens": float(tokens[1]) * _UNITS[tokens[2]] if tokens else math.nan,
    }
