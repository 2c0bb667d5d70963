"""Findings as sentences that claim no more than their numbers.

A claim needs enough observations, an interval that excludes chance and a test that rejects it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from lm_eval_coupling.statistics.correlations import Correlation
from lm_eval_coupling.statistics.curves import Fit
from lm_eval_coupling.statistics.estimates import CONFIDENCE, Result
from lm_eval_coupling.statistics.family_effects import FamilyEffect
from lm_eval_coupling.statistics.nested_regression import NestedModels
from lm_eval_coupling.statistics.resampling import FEW, FEW_FAMILIES
from lm_eval_coupling.statistics.right_answers import FEW_ANSWERS, Auroc, LogisticEffect
from lm_eval_coupling.statistics.strengths import CorrelationDifference


@dataclass(frozen=True)
class _Names:
    x: str
    y: str
    other: str
    unit: str
    p_adjusted: float | None
    carried: bool
    where: str


def in_words(
    result: Result,
    *,
    x: str = "coupling",
    y: str = "score",
    other: str = "the other",
    unit: str = "models",
    p_adjusted: float | None = None,
    carried: bool = True,
    where: str = "",
) -> str:
    """Return sentences on a result, its uncertainty and what it does not show, for any reader.

    Args:
        result: A result of a function of this package.
        x: Name of the predictor, where the result does not know it.
        y: Name of what is predicted, where the result does not know it.
        other: Name of the second predictor of ``compare_correlations``.
        unit: Name of the observations.
        p_adjusted: The p-value after adjusting for many tests; if given, it decides instead of
            the result's own.
        carried: Whether the correlation itself is beyond chance; if not, a comparison or a
            regression that builds on it claims nothing.
        where: Where a correlation holds, such as ``within families``.

    Raises:
        TypeError: If the result is of another kind.
    """
    where = f" {where}" if where else ""
    names = _Names(
        x=x, y=y, other=other, unit=unit, p_adjusted=p_adjusted, carried=carried, where=where
    )
    return _sentences(result, names)


def is_beyond_chance(result: Result, p_adjusted: float | None = None, null: float = 0.0) -> bool:
    """Return whether a correlation, a difference or an area supports a claim."""
    result_like: Any = result
    return _evidence(result, p_adjusted, result_like.low, result_like.high, null).is_clear


@singledispatch
def _sentences(result: Result, names: _Names) -> str:
    raise TypeError(f"got {type(result).__name__}, expected a result such as Correlation or Fit")


@_sentences.register
def _(result: Correlation, names: _Names) -> str:
    given = f", {result.given} numbers held fixed" if result.given else ""
    method = result.method.capitalize()
    subject = f"{method} correlation of {names.x} (x) with {names.y} (y){names.where}{given}"
    if math.isnan(result.coefficient):
        return _undefined(subject, result)
    verdict = _verdict(
        _evidence(result, names.p_adjusted, result.low, result.high),
        f"Higher {names.x} goes with {_direction(result.coefficient)} {names.y}{names.where}",
        f"{names.x} and {names.y} go together{names.where}",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {_count(result, names)}"
    return f"{subject}: {result.coefficient:.2f} ({numbers}). {verdict}{_dropped(result)}"


@_sentences.register
def _(result: CorrelationDifference, names: _Names) -> str:
    subject = f"Strength of the correlation with {names.y} of {names.x} against {names.other}"
    if math.isnan(result.p):
        return _undefined(subject, result)
    larger, smaller = (names.x, names.other) if result.difference > 0 else (names.other, names.x)
    verdict = _verdict(
        _evidence(result, names.p_adjusted, result.low, result.high),
        f"{larger} goes with {names.y} more strongly than {smaller} does",
        "one is stronger",
        names.carried,
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {_count(result, names)}"
    return (
        f"{subject}: {result.first:.2f} against {result.second:.2f}, difference of strengths "
        f"{result.difference:.2f} ({numbers}). {verdict}{_dropped(result)}"
    )


@_sentences.register
def _(result: Fit, names: _Names) -> str:
    """Describe a fitted curve: its slope or rate, R², p, and whether y depends on x."""
    form = "Straight line" if result.form == "line" else "Exponential"
    errors = {
        "none": "",
        "y": f", weighted by the errors of {names.y}",
        "x and y": ", with errors in both",
    }[result.errors]
    subject = f"{form} for {names.y} (y) over {names.x} (x){errors}"
    if result.reason:
        return _undefined(subject, result)
    assert result.parameters is not None  # None only where a reason is given
    claim = f"Higher {names.x} goes with {_direction(result.parameters[1])} {names.y}"
    parameter, steepness = "slope", result.coefficients.get("slope")
    bounds = (steepness.low, steepness.high) if steepness else (math.nan, math.nan)
    if steepness is None:
        # The interval of a rate does not tell whether y depends on x: a rate of 0 is a line.
        parameter, steepness = "rate", result.coefficients["c"]
        is_curved = result.p_curvature < 1 - CONFIDENCE
        is_curved &= not steepness.low <= 0 <= steepness.high
        worse = ", and a straight line fits worse"
        claim += worse if is_curved else ", but a straight line describes that as well"
    share = "" if math.isnan(result.r2) else f"R² {result.r2:.2f}, "
    interval = _interval(steepness, ".3g")
    verdict = _verdict(
        _evidence(result, names.p_adjusted, *bounds),
        claim,
        f"{names.y} depends on {names.x}",
        names.carried,
    )
    scatter = ""
    if result.dispersion > 1.5:
        scatter = (
            f" The points scatter {result.dispersion:.1f} times as much as their errors explain."
        )
    return (
        f"{subject}: {parameter} {steepness.value:.3g} ({interval}), {share}{_p(result, names)}, "
        f"{result.n} {names.unit}. {verdict}{scatter}{_dropped(result)}"
    )


@_sentences.register
def _(result: NestedModels, names: _Names) -> str:
    beyond = f" beyond {_list(result.covariates)}" if result.covariates else ""
    subject = f"{result.predictor} as predictor of {result.score}{beyond}"
    if result.reason:
        return _undefined(subject, result)
    before, after = result.without, result.with_predictor
    gains = [_gain("model", before.r2_left_out, after.r2_left_out)]
    if 1 < result.families < result.n:
        gains.append(_gain("family", before.r2_left_out_family, after.r2_left_out_family))
    evidence = _evidence(result, names.p_adjusted, result.partial.low, result.partial.high)
    question = f"{result.predictor} says anything of {result.score}{beyond}"
    claim = f"{result.predictor} says something of {result.score}{beyond}"
    verdict = _verdict(evidence, claim, question, names.carried)
    if evidence.is_clear and names.carried and any(gain.is_worse for gain in gains):
        verdict = (
            f"No clear evidence that {question}: it does not help to predict what was left out."
        )
    numbers = f"partial correlation {result.partial.coefficient:.2f}, {_interval(result.partial)}"
    return (
        f"{subject}: R² goes from {before.r2:.2f} to {after.r2:.2f} ({numbers}, "
        f"{_p(result, names)}, {_count(result.partial, names)}). {verdict} "
        f"{' '.join(gain.words for gain in gains)}{_notes(result)}{_dropped(result)}"
    )


@_sentences.register
def _(result: FamilyEffect, names: _Names) -> str:
    how = "families as random effects" if result.method == "mixed" else "errors clustered by family"
    subject = f"{result.predictor} as predictor of {names.y}, {how}"
    if result.reason:
        return _undefined(subject, result)
    verdict = _verdict(
        _evidence(result, names.p_adjusted, result.effect.low, result.effect.high),
        f"Higher {result.predictor} goes with {_direction(result.effect.value)} {names.y}",
        f"{result.predictor} and {names.y} go together",
        names.carried,
    )
    interval = _interval(result.effect, ".3g")
    numbers = f"{interval}, {_p(result, names)}, {_count(result, names)}"
    return (
        f"{subject}: coefficient {result.effect.value:.3g} ({numbers}). "
        f"{verdict}{_notes(result)}{_dropped(result)}"
    )


@_sentences.register
def _(result: Auroc, names: _Names) -> str:
    pooled = f" within {result.tasks} tasks" if result.tasks > 1 else ""
    pooled += f" of {result.models} models" if result.models > 1 else ""
    subject = f"AUROC of {names.x} for right answers{pooled}"
    if math.isnan(result.auroc):
        return _undefined(subject, result)
    counts = f"{result.right} right, {result.wrong} wrong"
    if result.reason:
        return f"{subject}: {result.auroc:.2f}, {result.reason} ({counts}).{_dropped(result)}"
    verdict = _verdict(
        _evidence(result, names.p_adjusted, result.low, result.high, 0.5),
        f"Right answers tend to have {_direction(result.auroc - 0.5)} {names.x} than wrong ones",
        f"{names.x} tells right from wrong answers",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {counts}"
    return f"{subject}: {result.auroc:.2f} ({numbers}). {verdict}{_dropped(result)}"


@_sentences.register
def _(result: LogisticEffect, names: _Names) -> str:
    controls = [*result.controls]
    controls += ["the task"] if result.tasks > 1 else []
    controls += ["the model"] if result.models > 1 else []
    given = f", {_list(controls)} held fixed" if controls else ""
    subject = f"Odds of a right answer per standard deviation of {result.predictor}{given}"
    if result.reason:
        return _undefined(subject, result)
    direction = _direction(result.odds_ratio - 1)
    verdict = _verdict(
        _evidence(result, names.p_adjusted, result.low, result.high, 1.0),
        f"Higher {result.predictor} goes with {direction} odds of a right answer",
        f"{result.predictor} tells right from wrong answers",
        names.carried,
    )
    unit = "answers" if result.models > 1 else "documents"
    numbers = f"{_interval(result)}, {_p(result, names)}, {result.n} {unit}"
    return (
        f"{subject}: times {result.odds_ratio:.2f} ({numbers}). "
        f"{verdict}{_notes(result)}{_dropped(result)}"
    )


@dataclass(frozen=True)
class _Evidence:
    """Support of a claim; ``few`` names a count that is too small, or is empty."""

    few: str
    rejects: bool
    excludes: bool
    null: float

    @property
    def is_clear(self) -> bool:
        return not self.few and self.rejects and self.excludes


def _evidence(
    result: Any, p_adjusted: float | None, low: float, high: float, null: float = 0.0
) -> _Evidence:
    """Weigh test and interval; without an interval the test decides alone."""
    p = result.p if p_adjusted is None else p_adjusted
    is_bounded = not (math.isnan(low) or math.isnan(high))
    excludes = not is_bounded or low > null or high < null
    return _Evidence(_few(result), p < 1 - CONFIDENCE, excludes, null)


def _few(result: Any) -> str:
    if isinstance(result, Auroc | LogisticEffect):
        n = result.rarer if isinstance(result, LogisticEffect) else min(result.right, result.wrong)
        return f"{n} answers of one kind" if n < FEW_ANSWERS else ""
    if result.n < FEW:
        return f"{result.n} observations"
    families = getattr(result, "families", 0)
    return f"{families} families" if 1 < families < FEW_FAMILIES else ""


def _verdict(evidence: _Evidence, claim: str, question: str, carried: bool = True) -> str:
    if evidence.few:
        return f"{evidence.few} are too few to conclude anything."
    if not evidence.excludes:
        return f"No evidence that {question}: the interval includes {evidence.null:g}."
    if not evidence.rejects:
        return f"No clear evidence that {question}: the test does not reject chance."
    if not carried:
        return f"No clear evidence that {question}: the correlation itself is not beyond chance."
    return f"{claim}."


@dataclass(frozen=True)
class _Gain:
    words: str
    is_worse: bool


def _gain(unit: str, old: float, new: float) -> _Gain:
    start = f"Predicting each {unit} from the others"
    if math.isnan(old) or math.isnan(new):
        return _Gain(f"{start} is not possible, as they do not determine the regression.", False)
    verdict = "which is better" if new > 0 else "which is still worse than their mean"
    if new <= old:
        verdict = "which is no better"
    return _Gain(f"{start}, R² goes from {old:.2f} to {new:.2f}, {verdict}.", new <= old)


def _direction(value: float) -> str:
    return "higher" if value > 0 else "lower"


def _interval(result: Any, spec: str = ".2f") -> str:
    if math.isnan(result.low) or math.isnan(result.high):
        return "no interval"
    return f"{CONFIDENCE:.0%} interval {result.low:{spec}} to {result.high:{spec}}"


def _p(result: Any, names: _Names) -> str:
    p, label = (result.p, "p") if names.p_adjusted is None else (names.p_adjusted, "adjusted p")
    return f"{label} < 0.001" if p < 0.001 else f"{label} = {p:.2g}"


def _count(result: Any, names: _Names) -> str:
    families = f" of {result.families} families" if result.families else ""
    return f"{result.n} {names.unit}{families}"


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _undefined(subject: str, result: Any) -> str:
    return f"{subject}: undefined, as {result.reason}.{_dropped(result)}"


def _notes(result: Any) -> str:
    return f" But {'; '.join(result.notes)}." if result.notes else ""


def _dropped(result: Any) -> str:
    return f" {result.dropped} observations were left out." if result.dropped else ""
