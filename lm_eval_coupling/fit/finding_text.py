"""The finding in a few paragraphs that claim no more than the numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.fit.observations import Observations
from lm_eval_coupling.fit.other_tasks import MEAN
from lm_eval_coupling.statistics import (
    Corrected,
    Correlation,
    CorrelationDifference,
    Fit,
    NestedModels,
    Reliability,
    adjust_p_values,
    in_words,
)
from lm_eval_coupling.statistics.estimates import CONFIDENCE
from lm_eval_coupling.statistics.resampling import FEW, FEW_FAMILIES
from lm_eval_coupling.statistics.sentences import is_beyond_chance

MANY = 6  # scores or models; beyond it they are counted instead of described one by one
_NAMED = 3  # members on which a finding hangs
_STRONG = 0.5  # |r| at which the reader is told which members it hangs on


@dataclasses.dataclass(frozen=True)
class MainResults:
    """Results of the main predictor with one score, the main one."""

    pearson: Correlation
    fits: Mapping[str, Fit]  # by form
    within_families: Correlation | None
    against_size: tuple[str, CorrelationDifference] | None
    nested: list[NestedModels]
    influence: pd.DataFrame


def describe_models(
    observations: Observations,
    pearson: Mapping[str, Correlation],
    results: MainResults,
) -> list[str]:
    """Return paragraphs on how the main predictor goes with the scores across models.

    Args:
        observations: The observations.
        pearson: Pearson's correlation with the main predictor, by score.
        results: Further results of the main score.
    """
    words, main_score = [_describe_observations(observations)], observations.main_score
    adjusted = adjust_by_name({score: r.p for score, r in pearson.items()})
    described = list(pearson)
    if len(pearson) > MANY:
        counts = _count_scores(pearson, adjusted, observations.main.name)
        words.append(f"{counts} The tables have them one by one.")
        described = [main_score]
    for score in described:
        p = adjusted[score] if len(pearson) > 1 else None
        names = {"x": observations.main.name, "y": score}
        where = "across models" if pearson[score].families else ""
        sentences = [in_words(pearson[score], **names, p_adjusted=p, where=where)]
        if score == main_score:
            carried = is_beyond_chance(pearson[score], p)
            sentences += _describe_main(results, names, carried)
        words.append(" ".join(sentences))
    return words


def _describe_main(results: MainResults, names: Mapping[str, str], carried: bool) -> Iterator[str]:
    """Yield the sentences on the main score that follow its correlation with coupling.

    Args:
        results: the further results.
        names: names of predictor and score, as of :func:`in_words`.
        carried: whether the correlation is beyond chance.
    """
    yield from _describe_influence(results.influence, results.pearson)
    if results.within_families is not None:
        yield _describe_within(results.within_families, results.pearson, names)
    line, exponential = (results.fits[form] for form in ("line", "exponential"))
    if not (math.isnan(line.r2) or math.isnan(exponential.r2)):
        yield (
            f"A straight line has R² {line.r2:.2f}, an exponential, which has one parameter more, "
            f"{exponential.r2:.2f}."
        )
    if results.against_size is not None:
        other, difference = results.against_size
        yield in_words(difference, **names, other=other, carried=carried)
    for nested in results.nested:
        yield in_words(nested, carried=carried)


def _describe_influence(rows: pd.DataFrame, all_models: Correlation) -> Iterator[str]:
    """Name the members on which the finding hangs, families first."""
    is_strong = abs(all_models.coefficient) >= _STRONG or is_beyond_chance(all_models)
    deciding = rows[rows["decides"]] if len(rows) and is_strong else pd.DataFrame()
    if not len(deciding):
        return
    change = (deciding["coefficient"] - all_models.coefficient).abs()
    deciding = deciding.assign(change=change).sort_values(
        ["kind", "change"], ascending=[True, False]
    )
    parts = [
        f"without {'the family ' if row['kind'] == 'family' else ''}{row['without']} the "
        f"correlation is {row['coefficient']:.2f} (p = {row['p']:.2g})"
        for row in deciding.to_dict("records")
    ]
    others = len(parts) - _NAMED
    more = f"; so it is with {others} more" if others > 0 else ""
    yield f"It hangs on single members: {'; '.join(parts[:_NAMED])}{more}."


def _describe_within(within: Correlation, across: Correlation, names: Mapping[str, str]) -> str:
    plain = dataclasses.replace(within, method="pearson", given=0)
    words = in_words(plain, **names, where="within families")
    turns = within.coefficient * across.coefficient < 0
    if turns and is_beyond_chance(within):
        words += " Within families the direction is the opposite of that across models."
    return words


def adjust_by_name(p: Mapping[Any, float]) -> dict[Any, float]:
    """Adjust p-values for their number by Holm."""
    return dict(zip(p, adjust_p_values(list(p.values())).tolist(), strict=True))


def _describe_observations(observations: Observations) -> str:
    families = observations.frame.groupby("family")["label"].nunique()
    models, scores = observations.models, len(observations.scores)
    words = [
        f"{models} models of {len(families)} {_plural('family', len(families))} and {scores} "
        f"{_plural('score', scores)}."
    ]
    if models < FEW:
        words.append(f"Fewer than {FEW} models: whatever the numbers, no conclusion can be drawn.")
    if len(families) == 1:
        words.append(
            "They are relatives, not a sample of models: intervals and p-values hold for this "
            "series alone."
        )
    elif len(families) < models:
        words.append("Tests permute families as wholes, and intervals leave out each family.")
        if len(families) < FEW_FAMILIES:
            words.append(
                f"Fewer than {FEW_FAMILIES} families: no conclusion can be drawn across families."
            )
    if not observations.covariates:
        words.append(
            "They do not differ in a known size, so that size neither explains the scores nor can "
            "be held fixed."
        )
    return " ".join(words)


def _first_of(names: Sequence[str]) -> str:
    """List the first names, and count those beyond ``MANY``."""
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return f"{', '.join(names[:MANY])}{more}"


def _plural(word: str, number: int) -> str:
    if number == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def _count_scores(
    pearson: Mapping[str, Correlation], adjusted: Mapping[str, float], main: str
) -> str:
    clear = [r for score, r in pearson.items() if is_beyond_chance(r, adjusted[score])]
    up = sum(r.coefficient > 0 for r in clear)
    return (
        f"Of {len(pearson)} scores, {up} go up and {len(clear) - up} go down with {main} beyond "
        "chance (Pearson, adjusted for their number by Holm)."
    )


def describe_predictors(
    rows: pd.DataFrame,
    correlated: Mapping[tuple[str, str, str], Correlation],
    score: str,
    own: Mapping[str, bool],
) -> Iterator[str]:
    """Count the distinct predictors that go with the score, adjusted for all of them at once.

    Args:
        rows: Table of :func:`~lm_eval_coupling.fit.across_models.correlation_table`.
        correlated: The correlations, by score, predictor and method.
        score: The score.
        own: Whether each predictor's correlation with the score, one of several scores, is beyond
            chance, by name.

    Yields:
        One sentence; none for fewer than two predictors.
    """
    rows = rows[(rows["score"] == score) & rows["p_simultaneous"].notna()]
    distinct = rows[rows["same_as"] == ""]
    if len(distinct) < 2:
        return
    clear = [
        row["predictor"]
        for row in distinct.sort_values("p_simultaneous").to_dict("records")
        if own[row["predictor"]]
        and is_beyond_chance(correlated[score, row["predictor"], "pearson"], row["p_simultaneous"])
    ]
    verdict = f"none goes with {score} beyond chance"
    if clear:
        verdict = f"{len(clear)} go with {score} beyond chance: {_first_of(clear)}"
    yield (
        f"Of {len(distinct)} distinct predictors and ranks together (permutations that adjust for "
        f"all at once) {verdict}."
    )


def describe_rivals(
    compared: Mapping[str, CorrelationDifference],
    main: str,
    score: str,
    own: Mapping[str, bool],
    described: str | None,
) -> Iterator[str]:
    """Describe how strongly the main predictor goes with the score beside every rival.

    Args:
        compared: Comparisons with the rivals, by name.
        main: Name of the main predictor.
        score: The score.
        own: Whether each predictor's own correlation is beyond chance, by name.
        described: Name of a rival that has been described already.

    Yields:
        One paragraph; none without rivals.
    """
    tested = {name: r for name, r in compared.items() if not math.isnan(r.p)}
    if not tested:
        return
    adjusted = adjust_by_name({name: r.p for name, r in tested.items()})
    clear = [name for name, r in tested.items() if is_beyond_chance(r, adjusted[name])]
    more = sum(tested[name].difference > 0 and own[main] for name in clear)
    less = sum(tested[name].difference < 0 and own[name] for name in clear)
    strongest = max(tested, key=lambda name: abs(tested[name].second))
    rivals = f"{len(tested)} {_plural('rival', len(tested))}"
    words = (
        f"Beside {rivals}, strengths compared: {main} goes with {score} more strongly than "
        f"{more} and less strongly than {less}, beyond chance (adjusted for "
        f"their number by Holm). The strongest is {strongest}."
    )
    if strongest != described:
        difference = tested[strongest]
        comparison = in_words(
            difference,
            x=main,
            y=score,
            other=strongest,
            p_adjusted=adjusted[strongest],
            carried=own[main if difference.difference > 0 else strongest],
        )
        words = f"{words} {comparison}"
    yield words


def describe_noise(
    reliable: Reliability | None, corrected: Corrected | None, main: str, score: str
) -> Iterator[str]:
    """Describe the reliability of the main predictor, and the correlation without noise."""
    if reliable is not None and reliable.reason:
        yield f"The reliability of {main} over documents is not estimable: {reliable.reason}."
    elif reliable is not None:
        few = ""
        if reliable.alpha < 0.5:
            few = " Its differences between models are mostly the documents' noise."
        needed = ""
        if not math.isnan(reliable.enough):
            needed = f"; {reliable.enough:.0f} documents would give 0.9"
        interval = f"{CONFIDENCE:.0%} interval {reliable.low:.2f} to {reliable.high:.2f}"
        yield (
            f"Reliability of {main} over documents: {reliable.alpha:.2f} ({interval}, "
            f"{reliable.models} models, {reliable.documents} documents that all have{needed}).{few}"
        )
    if corrected is None or math.isnan(corrected.observed):
        return
    if math.isnan(corrected.coefficient):
        yield f"Its correlation with {score} is not corrected for noise: {corrected.reason}."
        return
    reliabilities = f"{corrected.reliability_x:.2f} and {corrected.reliability_y:.2f}"
    yield (
        f"Without the noise of the documents its correlation with {score} would be "
        f"{corrected.coefficient:.2f} instead of {corrected.observed:.2f} (reliabilities "
        f"{reliabilities}, taken as known)."
    )


def describe_tasks(
    main: str,
    own: Mapping[str, Correlation],
    swapped: Mapping[tuple[str, str, str], Correlation],
) -> Iterator[str]:
    """Compare coupling on a task's own documents with coupling on those of other tasks."""
    others = [r.coefficient for r in swapped.values() if not math.isnan(r.coefficient)]
    scores = {score for score, *_ in swapped}
    mine = [own[score].coefficient for score in scores if score in own]
    mine = [r for r in mine if not math.isnan(r)]
    if others and mine:
        yield (
            f"Measured on a task's own documents {main} correlates with its score by "
            f"{statistics.median(mine):.2f} (median over {len(mine)} tasks), measured on another "
            f"task's by {statistics.median(others):.2f} (over {len(others)} pairs of tasks)."
        )


def describe_other_tasks(
    nested: Mapping[tuple[str, str, str], NestedModels],
    beyond_chance: Mapping[str, Mapping[str, bool]],
) -> Iterator[str]:
    """Describe what the main predictor adds to the scores of the other tasks.

    Args:
        nested: Nested models by score, predictor and what is held fixed.
        beyond_chance: Whether each predictor's correlation is, by score and predictor.

    Yields:
        One paragraph; none where no score has other tasks beside it.
    """
    of = {score: r for (score, _, given), r in nested.items() if given == MEAN and not r.reason}
    if not of:
        return
    adjusted = adjust_by_name({score: r.p for score, r in of.items()})
    clear = [
        score
        for score, r in of.items()
        if beyond_chance[score][r.predictor] and is_beyond_chance(r.partial, adjusted[score])
    ]
    main = next(iter(of.values())).predictor
    alone = statistics.median(r.without.r2 for r in of.values())
    partial = [r.partial.coefficient for r in of.values()]
    scores = f"{len(of)} {_plural('score', len(of))}"
    verdict = f"{main} adds nothing beyond chance to what the other tasks say of any of them"
    if clear:
        verdict = (
            f"{main} adds something to what the other tasks say of {len(clear)} of them "
            f"({_first_of(clear)})"
        )
    yield (
        f"Scores of the other tasks as a rival: their mean z-score, seen from the other models, "
        f"explains R² {alone:.2f} of a score (median of {scores}). Given it, {verdict} (partial "
        f"correlations {min(partial):.2f} to {max(partial):.2f}, p adjusted for their number by "
        "Holm)."
    )


def describe_training(results: Mapping[tuple[str, str, str, str], Correlation]) -> Iterator[str]:
    """Describe how the main predictor goes with the score over the checkpoints of a training.

    Checkpoints follow each other, so that no test of independent observations applies.

    Yields:
        A sentence per training and score that describes and claims nothing.
    """
    curves: dict[tuple[str, str, str], dict[str, Correlation]] = {}
    for (lineage, score, predictor, of), result in results.items():
        curves.setdefault((lineage, score, predictor), {})[of] = result
    for (lineage, score, predictor), parts in curves.items():
        levels, changes = (parts[name] for name in ("levels", "changes"))
        if math.isnan(levels.coefficient):
            yield (
                f"Along the training of {lineage}: the rank correlation of {predictor} with "
                f"{score} is undefined, as {levels.reason}."
            )
            continue
        words = (
            f"Along the training of {lineage}: {predictor} and {score} have rank correlation "
            f"{levels.coefficient:.2f} over {levels.n} checkpoints"
        )
        if not math.isnan(changes.coefficient):
            words += (
                f", and their changes {changes.coefficient:.2f} over {changes.n} steps between "
                "checkpoints"
            )
        yield (
            f"{words}. Checkpoints of one training are not independent observations, so that this "
            "describes the training and tests nothing."
        )
