"""Across models: does a predictor go with the score, and does it say more than size does? One table per question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from lm_eval_coupling.fit.observations import Observations, Predictor
from lm_eval_coupling.statistics import (
    Correlation,
    CorrelationDifference,
    FamilyEffect,
    Fit,
    NestedModels,
    adjust_p_values,
    compare_correlations,
    correlation,
    exponential_fit,
    family_effect,
    line_fit,
    nested_models,
)
from lm_eval_coupling.statistics.results import Result

METHODS = ("pearson", "spearman", "kendall")
_SMALLEST_FAMILY = 3


def table(results: Mapping[tuple[str, ...], Result], *keys: str) -> pd.DataFrame:
    """One row per result, its key in the columns ``keys``."""
    return pd.DataFrame([dict(zip(keys, key, strict=True)) | result.to_dict() for key, result in results.items()])


def correlations(found: Observations, *, resamples: int = 1999) -> dict[tuple[str, str, str], Correlation]:
    """Pearson, Spearman and Kendall of every predictor with every score, by score, predictor and method."""
    return {
        (score, name, method): correlation(group[name], group["score"], method=method, resamples=resamples)
        for score, group in found.by_score()
        for name in [predictor.name for predictor in found.predictors]
        for method in METHODS
    }


def correlation_table(results: Mapping[tuple[str, str, str], Correlation]) -> pd.DataFrame:
    """With ``p_holm``, adjusted for the many scores, and ``p_bh``, for all predictors and scores, each within a method."""
    rows = table(results, "score", "predictor", "method")
    rows["p_holm"] = rows.groupby(["predictor", "method"])["p"].transform(adjust_p_values)
    rows["p_bh"] = rows.groupby("method")["p"].transform(lambda p: adjust_p_values(p, "fdr_bh"))
    return rows


def fits(found: Observations) -> dict[tuple[str, str, str, str], Fit]:
    """Line and exponential (paper, fig. 7), without errors, weighted by those of the score, and with those of both.

    By score, predictor, form and whose errors.
    """
    return {
        (score, predictor.name, fit.form, fit.errors): fit
        for score, group in found.by_score()
        for predictor in found.predictors
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


def subsets(found: Observations) -> pd.DataFrame:
    """Correlation and R² of the main predictor among all models, base and tuned ones, and each family (paper, table 4)."""
    rows = []
    for score, group in found.by_score():
        for name, members in _subsets(group):
            x, y = members[found.main.name], members["score"]
            curves = {"line": line_fit(x, y), "exponential": exponential_fit(x, y)}
            found_there = correlation(x, y).to_dict()
            measures = {f"{form}_{part}": getattr(fit, part) for form, fit in curves.items() for part in ("r2", "p")}
            rows.append({"score": score, "subset": name, "predictor": found.main.name} | found_there | measures)
    return pd.DataFrame(rows)


def _subsets(group: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", group
    tuned = group["tuned"].astype("boolean").fillna(False)
    if tuned.any() and not tuned.all():
        yield "base", group[~tuned]
        yield "tuned", group[tuned]
    if group["family"].nunique() > 1:
        for family, members in group.groupby("family"):
            if len(members) >= _SMALLEST_FAMILY:
                yield f"family {family}", members


def comparisons(found: Observations) -> dict[tuple[str, str, str], CorrelationDifference]:
    """Whether the main predictor correlates more with the score than size does (Williams), by score and predictors.

    What is expected to go against the score is turned around first.
    """
    return {
        (score, found.main.name, size.name): compare_correlations(
            group["score"], found.main.sign * group[found.main.name], group[size.name]
        )
        for score, group in found.by_score()
        for size in found.of_kind("size")
        if size != found.main
    }


def nested(found: Observations) -> dict[tuple[str, str, str], NestedModels]:
    """What the main predictor says beyond the number of parameters, and beyond all that is known of size."""
    sets = list(dict.fromkeys([tuple(found.covariates[:1]), tuple(found.covariates)]))
    results = {}
    for score, group in found.by_score():
        family = "family" if 1 < group["family"].nunique() else None
        for covariates in sets:
            if covariates and found.main.name not in covariates:
                results[score, found.main.name, " + ".join(covariates)] = nested_models(
                    group.rename(columns={"score": score}),
                    score=score,
                    predictor=found.main.name,
                    covariates=covariates,
                    family=family,
                )
    return results


def families(found: Observations) -> dict[tuple[str, str, str, str], FamilyEffect]:
    """The main predictor's coefficient where models come in families, alone and with the number of parameters."""
    results = {}
    for score, group in found.by_score():
        if not 1 < group["family"].nunique() < len(group):
            continue
        for covariates in dict.fromkeys([(), tuple(c for c in found.covariates[:1] if c != found.main.name)]):
            for method in ("mixed", "cluster"):
                results[score, found.main.name, " + ".join(covariates), method] = family_effect(
                    group,
                    score="score",
                    predictor=found.main.name,
                    family="family",
                    covariates=covariates,
                    method=method,
                )
    return results
