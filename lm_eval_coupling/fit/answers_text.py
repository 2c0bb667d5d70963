"""Sentences about right and wrong answers within models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lm_eval_coupling.fit.finding_text import MANY, adjust_by_name
from lm_eval_coupling.fit.within_models import POOLED, TOGETHER
from lm_eval_coupling.statistics import Auroc, LogisticEffect, in_words
from lm_eval_coupling.statistics.sentences import is_beyond_chance


def describe_documents(
    aurocs: Mapping[tuple[str, str, str], Auroc],
    logistics: Mapping[tuple[str, str, str, str], LogisticEffect],
    main: str,
) -> list[str]:
    """Describe whether the predictor tells right from wrong answers within each model."""
    pooled: dict[str, tuple[str, Auroc]] = {}
    for (model, task, predictor), area in aurocs.items():
        # The pool follows the single tasks of a model, and replaces them.
        if predictor == main and model != TOGETHER:
            pooled[model] = (task, area)
    if not pooled:
        return []
    adjusted = adjust_by_name({model: area.p for model, (_, area) in pooled.items()})
    together = [*_describe_together(aurocs, logistics, main)]
    if len(pooled) > MANY:
        areas = {model: area for model, (_, area) in pooled.items()}
        return [_count_areas(areas, adjusted, main), *together]
    words = []
    for model, (task, area) in pooled.items():
        p = adjusted[model] if len(pooled) > 1 else None
        carried = is_beyond_chance(area, p, null=0.5)
        sentences = [in_words(area, x=main, p_adjusted=p)]
        sentences += _describe_odds(logistics, model, task, main, carried)
        words.append(f"Within {model}, over documents: {' '.join(sentences)}")
    return words + together


def _describe_odds(
    logistics: Mapping[tuple[str, str, str, str], LogisticEffect],
    model: str,
    task: str,
    main: str,
    carried: bool,
) -> Iterator[str]:
    for (name, of_task, predictor, given), effect in logistics.items():
        if (name, of_task, predictor) == (model, task, main) and given:
            yield in_words(effect, carried=carried)


def _describe_together(
    aurocs: Mapping[tuple[str, str, str], Auroc],
    logistics: Mapping[tuple[str, str, str, str], LogisticEffect],
    main: str,
) -> Iterator[str]:
    """Describe the answers of all models together, and the other predictors that tell as well."""
    areas: dict[str, Auroc] = {}
    distinct: set[tuple[float, float]] = set()
    for (model, _, predictor), area in aurocs.items():
        # Definitions that are the same up to scale and sign have one area, and count once.
        numbers = (round(abs(area.auroc - 0.5), 12), round(area.stderr, 12))
        if model == TOGETHER and not math.isnan(area.p) and numbers not in distinct:
            distinct.add(numbers)
            areas[predictor] = area
    if main not in areas:
        return
    adjusted = adjust_by_name({name: area.p for name, area in areas.items()})
    carried = is_beyond_chance(areas[main], null=0.5)
    sentences = [in_words(areas[main], x=main)]
    sentences += _describe_odds(logistics, TOGETHER, POOLED, main, carried)
    if len(areas) > 1:
        clear = [
            f"{name} (AUROC {area.auroc:.2f})"
            for name, area in areas.items()
            if is_beyond_chance(area, adjusted[name], null=0.5)
        ]
        sentences.append(
            f"Adjusted for all {len(areas)} distinct predictors (Holm), {main} has "
            f"p = {adjusted[main]:.2g}; beyond chance are {', '.join(clear) or 'none'}."
        )
    models = areas[main].models
    yield f"All {models} models together, a document counting once: {' '.join(sentences)}"


def _count_areas(areas: Mapping[str, Auroc], adjusted: Mapping[str, float], main: str) -> str:
    clear = [
        area for model, area in areas.items() if is_beyond_chance(area, adjusted[model], null=0.5)
    ]
    up = sum(area.auroc > 0.5 for area in clear)
    values = [area.auroc for area in areas.values() if not math.isnan(area.auroc)]
    if not values:
        return f"Within {len(areas)} models, over documents: no AUROC of {main} is estimable."
    return (
        f"Within {len(areas)} models, over documents: AUROC of {main} for right answers from "
        f"{min(values):.2f} to {max(values):.2f}; beyond chance (adjusted for their number by "
        f"Holm) in {len(clear)} of them, in {up} with higher {main} for right answers."
    )
