"""The finding in a few paragraphs that claim no more than the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval_coupling.fit.observations import Observations
from lm_eval_coupling.fit.within import POOLED
from lm_eval_coupling.statistics import Auroc, Correlation, LogisticEffect, adjust_p_values, in_words
from lm_eval_coupling.statistics.correlations import FEW
from lm_eval_coupling.statistics.results import Result

_MANY = 6  # scores or models; beyond it they are counted instead of told one by one

Results = Mapping[tuple[str, ...], Result]


def about_models(
    found: Observations, correlated: Mapping[tuple[str, str], Correlation], results: Sequence[Results]
) -> list[str]:
    """What the main predictor says of the scores across models.

    Args:
        found: the observations.
        correlated: Pearson's correlation with the main predictor, by score and predictor.
        results: further findings by score and others, told of the last score: the mean, where there are several.
    """
    adjusted = _adjusted(correlated)
    words, scores = [_observed(found)], found.scores
    if len(scores) > _MANY:
        words.append(f"{_counted(correlated, adjusted)} The tables have them one by one.")
        scores = scores[-1:]
    for score in scores:
        key, about = (score, found.main.name), {"x": found.main.name, "y": score}
        sentences = [in_words(correlated[key], **about, p_adjusted=adjusted[key] if len(found.scores) > 1 else None)]
        if score == found.scores[-1]:  # all of it for the only score, or for the mean
            told = [(key[-1], result) for members in results for key, result in members.items() if key[0] == score]
            sentences += [in_words(result, **about, other=last) for last, result in told]
        words.append(" ".join(sentences))
    return words


def _adjusted(results: Mapping[Any, Correlation | Auroc]) -> dict[Any, float]:
    """p-values adjusted for their number, by Holm."""
    return dict(zip(results, adjust_p_values([result.p for result in results.values()]).tolist(), strict=True))


def _observed(found: Observations) -> str:
    families = found.frame.groupby("family")["label"].nunique()
    what = f"{found.models} models of {len(families)} {'family' if len(families) == 1 else 'families'}"
    words = [f"{what} and {len(found.scores)} {'score' if len(found.scores) == 1 else 'scores'}."]
    if found.models < FEW:
        words.append(f"Fewer than {FEW} models: whatever the numbers, no conclusion can be drawn.")
    if len(families) == 1:
        words.append("They are relatives, not a sample of models: intervals and p-values hold for this series alone.")
    if not found.covariates:
        words.append("They do not differ in a known size, so that size neither explains the scores nor can be held fixed.")
    return " ".join(words)


def _counted(correlated: Mapping[tuple[str, str], Correlation], adjusted: Mapping[tuple[str, str], float]) -> str:
    clear = [r for key, r in correlated.items() if adjusted[key] < 1 - r.confidence and r.n >= FEW]
    up = sum(r.coefficient > 0 for r in clear)
    main = next(iter(correlated))[1]
    return (
        f"Of {len(correlated)} scores, {up} go up and {len(clear) - up} go down with {main} beyond chance (Pearson, "
        "adjusted for their number by Holm)."
    )


def about_documents(
    aurocs: Mapping[tuple[str, str, str], Auroc], logistics: Mapping[tuple[str, str, str, str], LogisticEffect], main: str
) -> list[str]:
    """Whether coupling tells right from wrong answers within each model: pooled over tasks where there are several."""
    models = list(dict.fromkeys(model for model, *_ in aurocs))
    of = {model: POOLED if (model, POOLED, main) in aurocs else _only_task(aurocs, model) for model in models}
    pooled = {model: aurocs[model, task, main] for model, task in of.items() if (model, task, main) in aurocs}
    if not pooled:
        return []
    adjusted = _adjusted(pooled)
    if len(pooled) > _MANY:
        return [_counted_models(pooled, adjusted, main)]
    words = []
    for model, found in pooled.items():
        sentences = [in_words(found, x=main, p_adjusted=adjusted[model] if len(pooled) > 1 else None)]
        sentences += [
            in_words(result)
            for (name, task, predictor, given), result in logistics.items()
            if (name, task, predictor) == (model, of[model], main) and given
        ]
        words.append(f"Within {model}, over documents: {' '.join(sentences)}")
    return words


def _only_task(aurocs: Mapping[tuple[str, str, str], Auroc], model: str) -> str:
    return next(task for name, task, _ in aurocs if name == model)


def _counted_models(pooled: Mapping[str, Auroc], adjusted: Mapping[str, float], main: str) -> str:
    clear = [r for model, r in pooled.items() if adjusted[model] < 1 - r.confidence and min(r.right, r.wrong) >= FEW]
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
            names = {"x": f"the change of {predictor}", "y": f"the change of {score}", "unit": "steps between checkpoints"}
        yield f"Along the training of {lineage}: {in_words(found, **names)}"
