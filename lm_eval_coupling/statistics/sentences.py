"""Findings as sentences that claim no more than their numbers: evidence needs the interval and the test to agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from lm_eval_coupling.statistics.correlations import FEW, Correlation, CorrelationDifference
from lm_eval_coupling.statistics.curves import Fit
from lm_eval_coupling.statistics.estimates import Result
from lm_eval_coupling.statistics.regression import FamilyEffect, NestedModels
from lm_eval_coupling.statistics.right_answers import Auroc, LogisticEffect


@dataclass(frozen=True)
class _Names:
    x: str
    y: str
    other: str
    unit: str
    p_adjusted: float | None


def in_words(
    result: Result,
    *,
    x: str = "coupling",
    y: str = "score",
    other: str = "the other",
    unit: str = "models",
    p_adjusted: float | None = None,
) -> str:
    """The finding, its uncertainty and what it does not say, in a few sentences.

    Args:
        result: what a function of this package returned.
        x: name of the predictor, where the result does not know it.
        y: name of what it is to predict, where the result does not know it.
        other: name of the second predictor of ``compare_correlations``.
        unit: what the observations are.
        p_adjusted: the p-value after adjusting for many tests; if given, it decides instead of the result's own.

    Returns:
        Sentences for a reader who has not seen the numbers.

    Raises:
        TypeError: if the result is of another kind.
    """
    return _say(result, _Names(x=x, y=y, other=other, unit=unit, p_adjusted=p_adjusted))


@singledispatch
def _say(result: Result, names: _Names) -> str:
    raise TypeError(f"got {type(result).__name__}, expected a finding such as Correlation or Fit")


@_say.register
def _(result: Correlation, names: _Names) -> str:
    given = f", {result.given} numbers held fixed" if result.given else ""
    subject = f"{result.method.capitalize()} correlation of {names.x} (x) with {names.y} (y){given}"
    if math.isnan(result.coefficient):
        return _undefined(subject, result)
    verdict = _verdict(
        _evidence(result, names, result.low, result.high),
        f"Higher {names.x} goes with {_direction(result.coefficient)} {names.y}",
        f"{names.x} and {names.y} go together",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {result.n} {names.unit}"
    return f"{subject}: {result.coefficient:.2f} ({numbers}). {verdict}{_left_out(result)}"


@_say.register
def _(result: CorrelationDifference, names: _Names) -> str:
    subject = f"Correlation with {names.y} of {names.x} against that of {names.other}"
    if result.reason:
        return _undefined(subject, result)
    larger, smaller = (names.x, names.other) if result.difference > 0 else (names.other, names.x)
    verdict = _verdict(
        _evidence(result, names, result.low, result.high),
        f"That of {larger} is larger than that of {smaller}",
        "they differ",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {result.n} {names.unit}"
    return (
        f"{subject}: {result.first:.2f} against {result.second:.2f}, difference {result.difference:.2f} ({numbers}). "
        f"{verdict}{_left_out(result)}"
    )


@_say.register
def _(result: Fit, names: _Names) -> str:
    form = "Straight line" if result.form == "line" else "Exponential"
    errors = {
        "none": "",
        "y": f", weighted by the errors of {names.y}",
        "x and y": ", with errors in both",
    }[result.errors]
    subject = f"{form} for {names.y} (y) over {names.x} (x){errors}"
    if result.reason:
        return _undefined(subject, result)
    assert result.parameters is not None  # it has them unless it has a reason
    claim = f"Higher {names.x} goes with {_direction(result.parameters[1])} {names.y}"
    if result.form == "line":
        parameter, steepness = "slope", result.coefficients["slope"]
        evidence = _evidence(result, names, steepness.low, steepness.high)
    else:
        parameter, steepness = "rate", result.coefficients["c"]
        evidence = _evidence(result, names)  # a rate of zero is a line, not independence
        curved = (
            result.p_curvature < 1 - result.confidence and not steepness.low <= 0 <= steepness.high
        )
        claim += (
            ", and a straight line fits worse"
            if curved
            else ", but a straight line describes that as well"
        )
    share = "" if math.isnan(result.r2) else f"R² {result.r2:.2f}, "
    scatter = f" The points scatter {result.dispersion:.1f} times as much as their errors explain."
    return (
        f"{subject}: {parameter} {steepness.value:.3g} ({_interval(steepness, '.3g', result.confidence)}), {share}"
        f"{_p(result, names)}, {result.n} {names.unit}. {_verdict(evidence, claim, f'{names.y} depends on {names.x}')}"
        f"{scatter if result.dispersion > 1.5 else ''}{_left_out(result)}"
    )


@_say.register
def _(result: NestedModels, names: _Names) -> str:
    beyond = f" beyond {_list(result.covariates)}" if result.covariates else ""
    subject = f"What {result.predictor} says of {result.score}{beyond}"
    if result.reason:
        return _undefined(subject, result)
    before, after = result.without, result.with_predictor
    verdict = _verdict(
        _evidence(result, names, result.effect.low, result.effect.high),
        f"{result.predictor} says something of {result.score}{beyond}",
        f"{result.predictor} says anything of {result.score}{beyond}",
    )
    predictions = [_prediction("model", before.r2_left_out, after.r2_left_out)]
    if result.families:
        predictions.append(
            _prediction("family", before.r2_left_out_family, after.r2_left_out_family)
        )
    numbers = f"F(1, {result.df}) = {result.f:.3g}, {_p(result, names)}, {result.n} {names.unit}"
    return (
        f"{subject}: R² goes from {before.r2:.2f} to {after.r2:.2f} ({numbers}). "
        f"{verdict} {' '.join(predictions)}{_notes(result)}{_left_out(result)}"
    )


@_say.register
def _(result: FamilyEffect, names: _Names) -> str:
    how = "families as random effects" if result.method == "mixed" else "errors clustered by family"
    subject = f"{result.predictor} as predictor of {names.y}, {how}"
    if result.reason:
        return _undefined(subject, result)
    verdict = _verdict(
        _evidence(result, names, result.effect.low, result.effect.high),
        f"Higher {result.predictor} goes with {_direction(result.effect.value)} {names.y}",
        f"{result.predictor} and {names.y} go together",
    )
    numbers = f"{_interval(result.effect, '.3g', result.confidence)}, {_p(result, names)}"
    return (
        f"{subject}: coefficient {result.effect.value:.3g} ({numbers}, {result.n} {names.unit} of {result.families} "
        f"families). {verdict}{_notes(result)}{_left_out(result)}"
    )


@_say.register
def _(result: Auroc, names: _Names) -> str:
    pooled = f" within {result.tasks} tasks" if result.tasks > 1 else ""
    pooled += f" of {result.models} models" if result.models > 1 else ""
    subject = f"AUROC of {names.x} for right answers{pooled}"
    if math.isnan(result.auroc):
        return _undefined(subject, result)
    counts = f"{result.right} right, {result.wrong} wrong"
    if result.reason:
        return f"{subject}: {result.auroc:.2f}, {result.reason} ({counts}).{_left_out(result)}"
    verdict = _verdict(
        _evidence(result, names, result.low, result.high, 0.5),
        f"Right answers tend to have {_direction(result.auroc - 0.5)} {names.x} than wrong ones",
        f"{names.x} tells right from wrong answers",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {counts}"
    return f"{subject}: {result.auroc:.2f} ({numbers}). {verdict}{_left_out(result)}"


@_say.register
def _(result: LogisticEffect, names: _Names) -> str:
    controls = (
        *result.controls,
        *(["the task"] if result.tasks > 1 else []),
        *(["the model"] if result.models > 1 else []),
    )
    given = f", {_list(controls)} held fixed" if controls else ""
    subject = f"Odds of a right answer per standard deviation of {result.predictor}{given}"
    if result.reason:
        return _undefined(subject, result)
    verdict = _verdict(
        _evidence(result, names, result.low, result.high, 1.0),
        f"Higher {result.predictor} goes with {_direction(result.odds_ratio - 1)} odds of a right answer",
        f"{result.predictor} tells right from wrong answers",
    )
    numbers = f"{_interval(result)}, {_p(result, names)}, {result.n} {'answers' if result.models > 1 else 'documents'}"
    return f"{subject}: times {result.odds_ratio:.2f} ({numbers}). {verdict}{_notes(result)}{_left_out(result)}"


@dataclass(frozen=True)
class _Evidence:
    few: str  # what there is too little of, or empty
    rejects: bool
    excludes: bool
    null: float


def _evidence(
    result: Any, names: _Names, low: float = math.nan, high: float = math.nan, null: float = 0.0
) -> _Evidence:
    """What the test and the interval say; where there is no interval, the test alone."""
    n, of = (
        (min(result.right, result.wrong), "answers of one kind")
        if isinstance(result, Auroc)
        else (result.n, "observations")
    )
    few = f"{n} {of}" if n < FEW else ""
    p = result.p if names.p_adjusted is None else names.p_adjusted
    known = not (math.isnan(low) or math.isnan(high))
    return _Evidence(few, p < 1 - result.confidence, not known or low > null or high < null, null)


def _verdict(evidence: _Evidence, claim: str, question: str) -> str:
    if evidence.few:
        return f"{evidence.few} are too few to conclude anything."
    if not evidence.excludes:
        return f"No evidence that {question}: the interval includes {evidence.null:g}."
    if not evidence.rejects:
        return f"No clear evidence that {question}: the test does not reject chance."
    return f"{claim}."


def _prediction(what: str, old: float, new: float) -> str:
    start = f"Predicting each {what} from the others"
    if math.isnan(old) or math.isnan(new):
        return f"{start} is not possible, as they do not determine the regression."
    gain = (
        "which is no better"
        if new <= old
        else "which is better"
        if new > 0
        else "which is still worse than their mean"
    )
    return f"{start}, R² goes from {old:.2f} to {new:.2f}, {gain}."


def _direction(value: float) -> str:
    return "higher" if value > 0 else "lower"


def _interval(result: Any, spec: str = ".2f", confidence: float | None = None) -> str:
    if math.isnan(result.low) or math.isnan(result.high):
        return "no interval"
    return f"{confidence or result.confidence:.0%} interval {result.low:{spec}} to {result.high:{spec}}"


def _p(result: Any, names: _Names) -> str:
    p, label = (result.p, "p") if names.p_adjusted is None else (names.p_adjusted, "adjusted p")
    return f"{label} < 0.001" if p < 0.001 else f"{label} = {p:.2g}"


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _undefined(subject: str, result: Any) -> str:
    return f"{subject}: undefined, as {result.reason}.{_left_out(result)}"


def _notes(result: Any) -> str:
    return f" But {'; '.join(result.notes)}." if result.notes else ""


def _left_out(result: Any) -> str:
    return f" {result.dropped} observations were left out." if result.dropped else ""
