"""Predictors of a score: readings of a run, the model's size, its loss, and facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit.losses import LOSSES
from lm_eval_coupling.fit.other_tasks import OTHER_TASKS
from lm_eval_coupling.measures.registry import registered_measures

COVARIATES = ("log10_params", "n_layers", "d_model", "log10_training_tokens")
_SIZES = (*COVARIATES, "log10_compute", "n_heads", "vocab_size")
# The kind of this measure's readings; the kind of the others is the measure's name.
_COUPLING = {"depth": "coupling"}
_OF_SCORES = ("score", "score_error", "n_samples")  # numbers that are no facts of a model


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A column that may predict the score.

    ``kind`` is ``coupling``, the name of another measure, ``size``, ``loss``, ``tasks`` (scores of
    other tasks) or ``fact``. ``sign`` is the direction in which it is expected to go with the
    score, or 0. ``rank`` is its number of singular vectors, if it has one.
    """

    name: str
    kind: str
    sign: int = 1
    rank: int | None = None

    @property
    def error(self) -> str | None:
        """The column of its standard error, or None for exact numbers."""
        if self.kind in ("size", "tasks", "fact"):
            return None
        name, _, rank = self.name.partition("@")
        return f"{name}_stderr@{rank}" if rank else f"{name}_stderr"


def choose_predictors(
    rows: pd.DataFrame, x: Sequence[str] | None, notes: list[str]
) -> list[Predictor]:
    """Choose the predictors of these rows, the one in question first.

    Args:
        rows: Rows of :func:`~lm_eval_coupling.fit.scores.scored_rows`.
        x: Names; by default, or if empty, coupling at its headline rank, then all others. Size,
            loss and the scores of other tasks are always added.
        notes: Sentences about what was left out are added.

    Returns:
        The predictors that differ between models of a task, and the one in question in any case.

    Raises:
        CouplingError: If a name is unknown or of no number, or if there are no numbers at all.
    """
    available = {p.name: p for p in available_predictors(rows)}
    if not (x or available):
        raise CouplingError(
            "got no number that could predict a score; measure coupling, or name a number of the "
            "facts by x (--x)"
        )
    chosen = _named_predictors(rows, x, available) if x else list(available.values())
    varying = [p for p in chosen if _varies(rows, p)]
    if rows["label"].nunique() > 1 and (
        same := [p.name for p in chosen if p not in varying and rows[p.name].notna().any()]
    ):
        notes.append(f"the same for all models: {', '.join(same)}")
    partly = [p.name for p in varying if p.kind == "size" and rows[p.name].isna().any()]
    if partly:
        notes.append(f"not known of every model and not held fixed: {', '.join(partly)}")
    return [chosen[0], *(p for p in varying if p != chosen[0])]


def _named_predictors(
    rows: pd.DataFrame, x: Sequence[str], available: Mapping[str, Predictor]
) -> list[Predictor]:
    """Return the predictors of these names, then the rivals that coupling always has."""
    if unknown := [name for name in x if name not in available and not _is_fact(rows, name)]:
        expected = f"one of {', '.join(available)} or " if available else ""
        raise CouplingError(
            f"got no predictor {unknown[0]!r}, expected {expected}a number of the facts"
        )
    rivals = [name for name, p in available.items() if p.kind in ("size", "loss", "tasks")]
    names = dict.fromkeys([*x, *rivals])
    return [available.get(name, Predictor(name, "fact")) for name in names]


def available_predictors(rows: pd.DataFrame) -> Iterator[Predictor]:
    """Yield the predictors that the runs have, coupling at its headline rank first."""
    ranks = sorted(
        {int(name.partition("@")[2]) for name in rows.columns if name.startswith("coupling@")}
    )
    ranks.sort(key=lambda rank: rank != rows["coupling_rank"].mode()[0])
    for measure in registered_measures().values():
        kind = _COUPLING.get(measure.name, measure.name)
        for reading in [reading for reading in measure.readings if reading.over == "prompt"]:
            at = ranks if reading.of_rank else [None]
            names = {
                rank: reading.name if rank is None else f"{reading.name}@{rank}" for rank in at
            }
            yield from (
                Predictor(name, kind, reading.sign, rank)
                for rank, name in names.items()
                if name in rows
            )
        for sample_reading in measure.sample_readings:
            if sample_reading.name in rows:
                yield Predictor(sample_reading.name, kind, sample_reading.sign)
    yield from (
        Predictor(name, "tasks")
        for name in OTHER_TASKS
        if name in rows and rows[name].notna().any()
    )
    yield from (
        Predictor(name, "loss", sign)
        for name, sign in LOSSES.items()
        if name in rows and rows[name].notna().any()
    )
    yield from (Predictor(name, "size") for name in _SIZES if rows[name].notna().any())


def _is_fact(rows: pd.DataFrame, name: str) -> bool:
    """Return whether a column holds numbers that can stand as a fact about models."""
    if name not in rows or name in _OF_SCORES or not rows[name].notna().any():
        return False
    types = pd.api.types  # for pandas, booleans are numeric
    return types.is_numeric_dtype(rows[name]) and not types.is_bool_dtype(rows[name])


def _varies(rows: pd.DataFrame, predictor: Predictor) -> bool:
    values = rows[predictor.name]
    levels = values.groupby(rows["task"]).agg(lambda v: v.max() - v.min())
    return bool((levels > 1e-12 * values.abs().max()).any())
