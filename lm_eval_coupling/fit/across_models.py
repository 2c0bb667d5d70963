"""Correlations and regressions of scores with predictors across models, one table per question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.fit.observations import LEAST, Observations
from lm_eval_coupling.fit.other_tasks import OTHER_TASKS
from lm_eval_coupling.fit.predictors import Predictor
from lm_eval_coupling.statistics import (
    Correlation,
    CorrelationDifference,
    FamilyEffect,
    Fit,
    NestedModels,
    adjust_p_values,
    compare_correlations,
    correlation,
    correlation_within,
    exponential_fit,
    family_effect,
    influence,
    left_out,
    line_fit,
    nested_models,
    simultaneous_p_values,
)
from lm_eval_coupling.statistics.estimates import Result

METHODS = ("pearson", "spearman", "kendall")
_COUPLINGS = {"coupling", "swapped"}  # definitions of one thing are no rivals
_SAME = 1 - 1e-9  # |r| of predictors that differ by a scale and an offset only


def table(results: Mapping[Any, Result], *keys: str) -> pd.DataFrame:
    """Return one row per result, its key in the columns ``keys``."""
    return pd.DataFrame(
        [dict(zip(keys, key, strict=True)) | result.to_dict() for key, result in results.items()]
    )


def correlations(
    observations: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], Correlation]:
    """Return the correlation of each predictor with each score, by score, predictor and method."""
    return {
        (score, predictor.name, method): correlation(
            group[predictor.name],
            group["score"],
            method=method,
            family=group["family"],
            resamples=resamples,
        )
        for score, group in observations.compared()
        for predictor in observations.predictors
        for method in METHODS
    }


def distinct_predictors(observations: Observations, group: pd.DataFrame) -> dict[str, str]:
    """Map every predictor to the first one that is the same up to scale and offset."""
    first: dict[str, str] = {}
    for name in [predictor.name for predictor in observations.predictors]:
        same = (other for other in first.values() if _are_same(group[name], group[other]))
        first[name] = next(same, name)
    return first


def _are_same(x: pd.Series, y: pd.Series) -> bool:
    if not x.isna().equals(y.isna()):
        return False
    x, y = (v.dropna().to_numpy(dtype=float) for v in (x, y))
    if len(x) < LEAST or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return False
    return bool(abs(np.corrcoef(x, y)[0, 1]) > _SAME)


def correlation_table(
    results: Mapping[tuple[str, str, str], Correlation],
    observations: Observations,
    *,
    resamples: int = 1999,
) -> pd.DataFrame:
    """Return one row per correlation, with p adjusted for the many tests.

    Args:
        results: Correlations by score, predictor and method.
        observations: The observations that they are of.
        resamples: Number of permutations.

    Returns:
        ``p_holm`` is adjusted for the many scores, and ``p_bh`` for all predictors and scores,
        each within a method. ``p_simultaneous`` of Pearson's is adjusted for all predictors and
        ranks of a score by permutations that keep their correlations; predictors that are not
        known of every model have none. ``same_as`` is the first predictor that is the same up to a
        scale.
    """
    rows = table(results, "score", "predictor", "method")
    adjusted: dict[tuple[str, str, str], float] = {}
    same_as: dict[tuple[str, str], str] = {}
    for score, group in observations.compared():
        distinct = distinct_predictors(observations, group)
        same_as |= {(score, name): other for name, other in distinct.items() if other != name}
        scored = group[group["score"].notna()].reset_index(drop=True)
        complete = [name for name in distinct if scored[name].notna().all()]
        p = simultaneous_p_values(
            scored[complete], scored["score"], family=scored["family"], resamples=resamples
        )
        adjusted |= {(score, name, "pearson"): value for name, value in p.items()}
    rows["same_as"] = [same_as.get((score, name), "") for score, name, _ in results]
    rows["p_simultaneous"] = [adjusted.get(key, math.nan) for key in results]
    rows["p_holm"] = rows.groupby(["predictor", "method"])["p"].transform(adjust_p_values)
    distinct_p = rows["p"].where(rows["same_as"] == "")
    rows["p_bh"] = distinct_p.groupby(rows["method"]).transform(
        lambda p: adjust_p_values(p, "fdr_bh")
    )
    return rows


def fits(observations: Observations) -> dict[tuple[str, str, str, str], Fit]:
    """Return lines and exponentials (paper, figure 7) by score, predictor, form and used errors.

    They are unweighted, weighted by the errors of the score, and with the errors of both.
    """
    return {
        (score, predictor.name, fit.form, fit.errors): fit
        for score, group in observations.compared()
        for predictor in observations.predictors
        for fit in _fits(group, predictor)
    }


def _fits(group: pd.DataFrame, predictor: Predictor) -> Iterator[Fit]:
    x, y = group[predictor.name], group["score"]
    yield line_fit(x, y)
    yield exponential_fit(x, y)
    if group["score_error"].isna().all():
        return
    yield line_fit(x, y, y_error=group["score_error"])
    yield exponential_fit(x, y, y_error=group["score_error"])
    if predictor.error in group and (group[predictor.error] > 0).any():
        x_error = group[predictor.error].where(lambda e: e > 0)
        yield line_fit(x, y, y_error=group["score_error"], x_error=x_error)


def subsets(observations: Observations) -> pd.DataFrame:
    """Correlate the main predictor among all models, base and tuned ones, and each family.

    Returns:
        One row per score and subset with the correlation and R² of both curves (paper, table 4).
    """
    rows = []
    main = observations.main.name
    for score, group in observations.compared():
        for name, members in _subsets(group):
            x, y = members[main], members["score"]
            curves = {"line": line_fit(x, y), "exponential": exponential_fit(x, y)}
            about = {"score": score, "subset": name, "predictor": main}
            quality = {
                f"{form}_{part}": getattr(fit, part)
                for form, fit in curves.items()
                for part in ("r2", "p")
            }
            rows.append(about | correlation(x, y, family=members["family"]).to_dict() | quality)
    return pd.DataFrame(rows)


def _subsets(group: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", group
    tuned = group["tuned"].astype("boolean").fillna(False)
    for name, members in (("base", group[~tuned]), ("tuned", group[tuned])):
        if LEAST <= len(members) < len(group):
            yield name, members
    if group["family"].nunique() > 1:
        for family, members in group.groupby("family"):
            if len(members) >= LEAST:
                yield f"family {family}", members


def comparisons(
    observations: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], CorrelationDifference]:
    """Return comparisons of the main predictor with each rival, by score, predictor and rival.

    Compared is how strongly both correlate with the score. Rivals are all distinct predictors of
    another kind, except other definitions of coupling.
    """
    main = observations.main
    results = {}
    for score, group in observations.compared():
        distinct = distinct_predictors(observations, group)
        for rival in observations.predictors:
            is_other = rival.kind != main.kind and {rival.kind, main.kind} != _COUPLINGS
            if is_other and distinct[rival.name] == rival.name:
                results[score, main.name, rival.name] = compare_correlations(
                    group["score"],
                    group[main.name],
                    group[rival.name],
                    family=group["family"],
                    resamples=resamples,
                )
    return results


def comparison_table(results: Mapping[tuple[str, str, str], CorrelationDifference]) -> pd.DataFrame:
    """Return one row per comparison, with ``p_holm`` adjusted for the many rivals of a score."""
    rows = table(results, "score", "predictor", "other")
    if not len(rows):
        return rows
    return rows.assign(p_holm=rows.groupby("score")["p"].transform(adjust_p_values))


def nested(
    observations: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], NestedModels]:
    """Return what the main predictor adds to facts, by score, predictor and what is held fixed.

    Held fixed are the number of parameters, all facts of size, the compute of training, the loss,
    and compute (or else parameters) with loss; and each summary of the other tasks' scores. Each
    is where it is known of every model and differs.
    """
    results = {}
    main = observations.main.name
    for score, group in observations.compared():
        for covariates in _held_fixed(observations, group):
            if main not in covariates:
                results[score, main, " + ".join(covariates)] = nested_models(
                    group.rename(columns={"score": score}),
                    score=score,
                    predictor=main,
                    covariates=covariates,
                    family="family" if 1 < group["family"].nunique() else None,
                    resamples=resamples,
                )
    return results


def _held_fixed(observations: Observations, group: pd.DataFrame) -> list[tuple[str, ...]]:
    varying = {
        p.name
        for p in observations.of_kind("size", "loss", "tasks")
        if group[p.name].notna().all() and group[p.name].nunique() > 1
    }
    size = next((name for name in ("log10_compute", "log10_params") if name in varying), None)
    covariates = observations.covariates
    sets = [tuple(covariates[:1]), tuple(covariates), ("log10_compute",)]
    sets += [(loss,) for loss in ("gold_answer_loss", "bits_per_byte")]
    sets += [(size, loss) for loss in ("gold_answer_loss", "bits_per_byte") if size]
    sets += [(name,) for name in OTHER_TASKS]
    return [names for names in dict.fromkeys(sets) if names and varying.issuperset(names)]


def alone(observations: Observations) -> pd.DataFrame:
    """Return R² of a line over each predictor, in the data and of models and families left out."""
    rows = []
    for score, group in observations.compared():
        for predictor in observations.predictors:
            model = left_out(group["score"], group[predictor.name], group["family"])
            about = {"score": score, "predictor": predictor.name, "kind": predictor.kind}
            numbers = ("r2", "r2_left_out", "r2_left_out_family")
            rows.append(about | {name: getattr(model, name) for name in numbers})
    return pd.DataFrame(rows)


def swapped_tasks(
    observations: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], Correlation]:
    """Correlate the main predictor on the documents of one task with the score of another.

    Returns:
        The correlations by score, predictor and the task it was measured on; none for a predictor
        that is not measured on documents, such as a size.
    """
    if observations.main.error is None:
        return {}
    single = observations.frame[observations.frame["task"] != "mean"]
    main = observations.main.name
    results = {}
    for score, group in single.groupby("score_of", sort=False):
        for task, other in single.groupby("task", sort=False):
            if task == group["task"].iloc[0]:
                continue
            scores = group.set_index("label")[["score", "family"]]
            pairs = scores.join(other.set_index("label")[main], how="inner")
            if len(pairs) >= LEAST:
                results[score, main, task] = correlation(
                    pairs[main], pairs["score"], family=pairs["family"], resamples=resamples
                )
    return results


def families(observations: Observations) -> dict[tuple[str, str, str, str], FamilyEffect]:
    """Return the main predictor's effects by score, predictor, what is held fixed and method."""
    results = {}
    main = observations.main.name
    for score, group in observations.compared():
        if not 1 < group["family"].nunique() < len(group):
            continue
        size = tuple(name for name in observations.covariates[:1] if name != main)
        for covariates in dict.fromkeys([(), size]):
            for method in ("mixed", "cluster"):
                results[score, main, " + ".join(covariates), method] = family_effect(
                    group,
                    score="score",
                    predictor=main,
                    family="family",
                    covariates=covariates,
                    method=method,
                )
    return results


def within_families(
    observations: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str], Correlation]:
    """Return the main predictor's correlations within families, by score and predictor."""
    main = observations.main.name
    return {
        (score, main): correlation_within(group, main, "score", "family", resamples=resamples)
        for score, group in observations.compared()
        if 1 < group["family"].nunique() < len(group)
    }


def influences(
    observations: Observations,
    correlated: Mapping[tuple[str, str, str], Correlation],
    *,
    resamples: int = 999,
) -> pd.DataFrame:
    """Correlate the main predictor with each score without each model and each family.

    Returns:
        One row per score and left-out member, with ``decides`` where the finding hangs on it.
    """
    main = observations.main.name
    rows = []
    for score, group in observations.compared():
        results = influence(
            group[main],
            group["score"],
            group["label"].tolist(),
            family=group["family"],
            all_models=correlated[score, main, "pearson"],
            resamples=resamples,
        )
        rows += [{"score": score, "predictor": main} | result.to_dict() for result in results]
    return pd.DataFrame(rows)
