"""The finding in a few paragraphs that claim no more than the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.fit.observations import Observations
from lm_eval_coupling.fit.within_models import POOLED, TOGETHER
from lm_eval_coupling.statistics import (
    Auroc,
    Corrected,
    Correlation,
    CorrelationDifference,
    LogisticEffect,
    Reliability,
    adjust_p_values,
    in_words,
)
from lm_eval_coupling.statistics.correlations import FEW
from lm_eval_coupling.statistics.estimates import Result

_MANY = 6  # scores or models; beyond it they are counted instead of told one by one

Results = Mapping[tuple[str, ...], Result]


def about_models(
    found: Observations,
    correlated: Mapping[tuple[str, str], Correlation],
    results: Sequence[Results],
) -> list[str]:
    """What the main predictor says of the scores across models.

    Args:
        found: the observations.
        correlated: Pearson's correlation with the main predictor, by score and predictor.
        results: further findings by score and others, told of the last score: the mean, where there are several.

    Returns:
        Sentences, in the order of reading.
    """
    adjusted = _adjusted(correlated)
    words, scores = [_observed(found)], found.scores
    if len(scores) > _MANY:
        words.append(f"{_counted(correlated, adjusted)} The tables have them one by one.")
        scores = scores[-1:]
    for score in scores:
        key, about = (score, found.main.name), {"x": found.main.name, "y": score}
        sentences = [
            in_words(
                correlated[key],
                **about,
                p_adjusted=adjusted[key] if len(found.scores) > 1 else None,
            )
        ]
        if score == found.scores[-1]:  # all of it for the only score, or for the mean
            told = [
                (key[-1], result)
                for members in results
                for key, result in members.items()
                if key[0] == score
            ]
            sentences += [in_words(result, **about, other=last) for last, result in told]
        words.append(" ".join(sentences))
    return words


def _adjusted(
    results: Mapping[Any, Correlation | Auroc | CorrelationDifference],
) -> dict[Any, float]:
    """p-values adjusted for their number, by Holm."""
    return dict(
        zip(
            results,
            adjust_p_values([result.p for result in results.values()]).tolist(),
            strict=True,
        )
    )


def _observed(found: Observations) -> str:
    families = found.frame.groupby("family")["label"].nunique()
    what = (
        f"{found.models} models of {len(families)} {'family' if len(families) == 1 else 'families'}"
    )
    words = [f"{what} and {len(found.scores)} {'score' if len(found.scores) == 1 else 'scores'}."]
    if found.models < FEW:
        words.append(f"Fewer than {FEW} models: whatever the numbers, no conclusion can be drawn.")
    if len(families) == 1:
        words.append(
            "They are relatives, not a sample of models: intervals and p-values hold for this series alone."
        )
    if not found.covariates:
        words.append(
            "They do not differ in a known size, so that size neither explains the scores nor can be held fixed."
        )
    return " ".join(words)


def _counted(
    correlated: Mapping[tuple[str, str], Correlation], adjusted: Mapping[tuple[str, str], float]
) -> str:
    clear = [r for key, r in correlated.items() if adjusted[key] < 1 - r.confidence and r.n >= FEW]
    up = sum(r.coefficient > 0 for r in clear)
    main = next(iter(correlated))[1]
    return (
        f"Of {len(correlated)} scores, {up} go up and {len(clear) - up} go down with {main} beyond chance (Pearson, "
        "adjusted for their number by Holm)."
    )


def about_many(rows: pd.DataFrame, score: str) -> Iterator[str]:
    """How many of all predictors and ranks go with the score, adjusted for all of them at once.

    Args:
        rows: of :func:`~lm_eval_coupling.fit.across_models.correlation_table`.
        score: the one told of.

    Yields:
        One sentence, or none where there are not two predictors to adjust for.
    """
    known = rows[(rows["score"] == score) & rows["p_simultaneous"].notna()]
    if len(known) < 2:
        return
    clear = known[(known["p_simultaneous"] < 0.05) & (known["n"] >= FEW)]
    named = ", ".join(clear.sort_values("p_simultaneous")["predictor"][:_MANY])
    more = f" and {len(clear) - _MANY} more" if len(clear) > _MANY else ""
    told = f"{len(clear)} go with {score} beyond chance: {named}{more}"
    told = told if len(clear) else f"none goes with {score} beyond chance"
    yield f"Of {len(known)} predictors and ranks together (permutations that adjust for all at once) {told}."


def about_rivals(
    compared: Mapping[str, CorrelationDifference], main: str, score: str
) -> Iterator[str]:
    """How the main predictor stands beside every other number that is known of the models."""
    known = {name: r for name, r in compared.items() if not math.isnan(r.p)}
    if not known:
        return
    adjusted = _adjusted(known)
    clear = [r for name, r in known.items() if adjusted[name] < 1 - r.confidence and r.n >= FEW]
    more, less = sum(r.difference > 0 for r in clear), sum(r.difference < 0 for r in clear)
    strongest = max(known, key=lambda name: known[name].second)
    words = (
        f"Beside {len(known)} {'rival' if len(known) == 1 else 'rivals'}: {main} correlates more with {score} than {more} "
        f"and less than {less}, beyond chance (Williams, adjusted for their number by Holm). The strongest is {strongest}."
    )
    yield f"{words} {in_words(known[strongest], x=main, y=score, other=strongest, p_adjusted=adjusted[strongest])}"


def about_noise(
    reliable: Reliability | None, corrected: Corrected | None, main: str, score: str
) -> Iterator[str]:
    """Whether the main predictor agrees with itself over documents, and what the correlation would be without noise."""
    if reliable is not None and reliable.reason is None:
        few = (
            " A number that does not agree with itself predicts nothing."
            if reliable.alpha < 0.5
            else ""
        )
        needed = (
            ""
            if math.isnan(reliable.enough)
            else f"; {reliable.enough:.0f} documents would give 0.9"
        )
        interval = f"{reliable.confidence:.0%} interval {reliable.low:.2f} to {reliable.high:.2f}"
        yield (
            f"Reliability of {main} over documents: {reliable.alpha:.2f} ({interval}, {reliable.models} models, "
            f"{reliable.documents} documents that all have{needed}).{few}"
        )
    if corrected is not None and corrected.reason is None:
        known = f"reliabilities {corrected.reliability_x:.2f} and {corrected.reliability_y:.2f}, taken as known"
        yield (
            f"Without the noise of the documents its correlation with {score} would be {corrected.coefficient:.2f} instead "
            f"of {corrected.observed:.2f} ({known})."
        )
    elif corrected is not None and corrected.reason and not math.isnan(corrected.observed):
        yield f"Its correlation with {score} is not corrected for noise, as {corrected.reason}."


def about_tasks(
    found: Observations,
    own: Mapping[tuple[str, str], Correlation],
    swapped: Mapping[tuple[str, str, str], Correlation],
) -> Iterator[str]:
    """Whether coupling must be measured on a task's own documents to go with its score."""
    others = [r.coefficient for r in swapped.values() if not math.isnan(r.coefficient)]
    mine = [own[score, found.main.name].coefficient for score in {key[0] for key in swapped}]
    mine = [r for r in mine if not math.isnan(r)]
    if others and mine:
        own_median, other_median = statistics.median(mine), statistics.median(others)
        yield (
            f"Measured on a task's own documents {found.main.name} correlates with its score by {own_median:.2f} (median "
            f"over {len(mine)} tasks), measured on another task's by {other_median:.2f} (over {len(others)} pairs of tasks)."
        )


def about_documents(
    aurocs: Mapping[tuple[str, str, str], Auroc],
    logistics: Mapping[tuple[str, str, str, str], LogisticEffect],
    main: str,
) -> list[str]:
    """Whether coupling tells right from wrong answers within each model: pooled over tasks where there are several."""
    models = [model for model in dict.fromkeys(model for model, *_ in aurocs) if model != TOGETHER]
    of = {
        model: POOLED if (model, POOLED, main) in aurocs else _only_task(aurocs, model)
        for model in models
    }
    pooled = {
        model: aurocs[model, task, main]
        for model, task in of.items()
        if (model, task, main) in aurocs
    }
    if not pooled:
        return []
    adjusted, together = _adjusted(pooled), [*_about_models_together(aurocs, logistics, main)]
    if len(pooled) > _MANY:
        return [_counted_models(pooled, adjusted, main), *together]
    words = []
    for model, found in pooled.items():
        sentences = [
            in_words(found, x=main, p_adjusted=adjusted[model] if len(pooled) > 1 else None)
        ]
        sentences += [
            in_words(result)
            for (name, task, predictor, given), result in logistics.items()
            if (name, task, predictor) == (model, of[model], main) and given
        ]
        words.append(f"Within {model}, over documents: {' '.join(sentences)}")
    return words + together


def _about_models_together(
    aurocs: Mapping[tuple[str, str, str], Auroc],
    logistics: Mapping[tuple[str, str, str, str], LogisticEffect],
    main: str,
) -> Iterator[str]:
    """What the answers of all models say, which one model's may be too few for; and which other numbers say it as well."""
    found = {
        predictor: r
        for (model, _, predictor), r in aurocs.items()
        if model == TOGETHER and not math.isnan(r.p)
    }
    if main not in found:
        return
    adjusted = _adjusted(found)
    sentences = [in_words(found[main], x=main)]
    sentences += [
        in_words(r)
        for (model, _, x, given), r in logistics.items()
        if (model, x) == (TOGETHER, main) and given
    ]
    if len(found) > 1:
        clear = [
            f"{name} ({r.auroc:.2f})"
            for name, r in found.items()
            if adjusted[name] < 1 - r.confidence
        ]
        sentences.append(
            f"Adjusted for all {len(found)} numbers that were asked (Holm), {main} has p = {adjusted[main]:.2g}; beyond "
            f"chance are {', '.join(clear) or 'none'}."
        )
    yield f"All {found[main].models} models together, a document counting once: {' '.join(sentences)}"


def _only_task(aurocs: Mapping[tuple[str, str, str], Auroc], model: str) -> str:
    return next(task for name, task, _ in aurocs if name == model)


def _counted_models(pooled: Mapping[str, Auroc], adjusted: Mapping[str, float], main: str) -> str:
    clear = [
        r
        for model, r in pooled.items()
        if adjusted[model] < 1 - r.confidence and min(r.right, r.wrong) >= FEW
    ]
    up = sum(r.auroc > 0.5 for r in clear)
    areas = [r.auroc for r in pooled.values()]
    return (
        f"Within {len(pooled)} models, over documents: AUROC of {main} for right answers from {min(areas):.2f} to "
        f"{max(areas):.2f}; beyond chance (adjusted for their number by Holm) in {len(clear)} of them, in {up} with higher "
        f"{main} for right answers."
    )


def about_training(results: Mapping[tuple[str, str, str, str], Correlation]) -> Iterator[str]:
    """How the main predictor goes along with the score over the checkpoints of a training."""
    for (lineage, score, predictor, of), found in results.items():
        names = {"x": predictor, "y": score, "unit": "checkpoints"}
        if of == "changes":
            names = {
                "x": f"the change of {predictor}",
                "y": f"the change of {score}",
                "unit": "steps between checkpoints",
            }
        yield f"Along the training of {lineage}: {in_words(found, **names)}"
