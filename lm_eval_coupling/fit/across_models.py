"""Across models: does a predictor go with the score, and does it say more than size does? One table per question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from lm_eval_coupling.fit.observations import Observations
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
    exponential_fit,
    family_effect,
    left_out,
    line_fit,
    nested_models,
    simultaneous_p_values,
)
from lm_eval_coupling.statistics.estimates import Result

METHODS = ("pearson", "spearman", "kendall")
_SMALLEST_FAMILY = 3
_COUPLINGS = {"coupling", "swapped"}  # definitions of one thing are no rivals


def table(results: Mapping[Any, Result], *keys: str) -> pd.DataFrame:
    """One row per result, its key in the columns ``keys``."""
    return pd.DataFrame(
        [dict(zip(keys, key, strict=True)) | result.to_dict() for key, result in results.items()]
    )


def correlations(
    found: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], Correlation]:
    """Pearson, Spearman and Kendall of every predictor with every score, by score, predictor and method."""
    return {
        (score, name, method): correlation(
            group[name], group["score"], method=method, resamples=resamples
        )
        for score, group in found.by_score()
        for name in [predictor.name for predictor in found.predictors]
        for method in METHODS
    }


def correlation_table(
    results: Mapping[tuple[str, str, str], Correlation],
    found: Observations | None = None,
    *,
    resamples: int = 1999,
) -> pd.DataFrame:
    """With ``p_holm``, adjusted for the many scores, and ``p_bh``, for all predictors and scores, each within a method.

    Returns:
        With the observations also ``p_simultaneous`` of Pearson's: adjusted for all predictors and ranks of a score, by
        permutations that keep how they hang together; predictors that are not known of every model stay out.
    """
    rows = table(results, "score", "predictor", "method")
    if found is not None:
        names = [predictor.name for predictor in found.predictors]
        adjusted: dict[tuple[str, str, str], float] = {}
        for score, group in found.by_score():
            complete = [name for name in names if group[name].notna().all()]
            p = simultaneous_p_values(group[complete].reset_index(drop=True), group["score"].reset_index(drop=True),
                                      resamples=resamples)  # fmt: skip
            adjusted |= {(score, name, "pearson"): value for name, value in p.items()}
        keys = zip(rows["score"], rows["predictor"], rows["method"], strict=True)
        rows["p_simultaneous"] = pd.Series(
            [adjusted.get(key, math.nan) for key in keys], rows.index, dtype=float
        )
    rows["p_holm"] = rows.groupby(["predictor", "method"])["p"].transform(adjust_p_values)
    rows["p_bh"] = rows.groupby("method")["p"].transform(lambda p: adjust_p_values(p, "fdr_bh"))
    return rows


def fits(found: Observations) -> dict[tuple[str, str, str, str], Fit]:
    """Line and exponential (paper, fig. 7), without errors, weighted by those of the score, and with those of both.

    Returns:
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
            measures = {
                f"{form}_{part}": getattr(fit, part)
                for form, fit in curves.items()
                for part in ("r2", "p")
            }
            rows.append(
                {"score": score, "subset": name, "predictor": found.main.name}
                | found_there
                | measures
            )
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
    """Whether the main predictor correlates more with the score than each rival (Williams), by score and predictors.

    Rivals are all predictors of another kind, other definitions of coupling not among them. What is expected to go
    against the score is turned around first; of a rival that nobody has expected anything of, the better direction counts.

    Returns:
        The comparisons, by score, main predictor and rival.
    """
    return {
        (score, found.main.name, rival.name): compare_correlations(
            group["score"],
            found.main.sign * group[found.main.name],
            _turned(rival, group) * group[rival.name],
        )
        for score, group in found.by_score()
        for rival in found.predictors
        if rival.kind != found.main.kind and {rival.kind, found.main.kind} != _COUPLINGS
    }


def _turned(rival: Predictor, group: pd.DataFrame) -> int:
    if rival.sign:
        return rival.sign
    together = group[["score", rival.name]].dropna()
    return -1 if len(together) > 2 and together.corr().iloc[0, 1] < 0 else 1


def comparison_table(results: Mapping[tuple[str, str, str], CorrelationDifference]) -> pd.DataFrame:
    """With ``p_holm``, adjusted for the many rivals of a score."""
    rows = table(results, "score", "predictor", "other")
    return (
        rows.assign(p_holm=rows.groupby("score")["p"].transform(adjust_p_values))
        if len(rows)
        else rows
    )


def nested(found: Observations) -> dict[tuple[str, str, str], NestedModels]:
    """What the main predictor says beyond what is known of a model anyway.

    Held fixed are the number of parameters, all that is known of size, the compute of training, the loss, and compute
    (or else parameters) with loss: each where it is known of every model and differs.

    Returns:
        The nested models, by score, predictor and what is held fixed.
    """
    results = {}
    for score, group in found.by_score():
        family = "family" if 1 < group["family"].nunique() else None
        for covariates in _held_fixed(found, group):
            if found.main.name not in covariates:
                results[score, found.main.name, " + ".join(covariates)] = nested_models(
                    group.rename(columns={"score": score}),
                    score=score,
                    predictor=found.main.name,
                    covariates=covariates,
                    family=family,
                )
    return results


def _held_fixed(found: Observations, group: pd.DataFrame) -> list[tuple[str, ...]]:
    known = {
        p.name
        for p in found.of_kind("size", "loss")
        if group[p.name].notna().all() and group[p.name].nunique() > 1
    }
    size = next((name for name in ("log10_compute", "log10_params") if name in known), None)
    sets = [tuple(found.covariates[:1]), tuple(found.covariates), ("log10_compute",)]
    sets += [(loss,) for loss in ("gold_answer_loss", "bits_per_byte")]
    sets += [(size, loss) for loss in ("gold_answer_loss", "bits_per_byte") if size]
    return [names for names in dict.fromkeys(sets) if names and known.issuperset(names)]


def alone(found: Observations) -> pd.DataFrame:
    """Every predictor by itself: R² of a straight line, and of predicting models and families that it was not fitted to."""
    rows = []
    for score, group in found.by_score():
        for predictor in found.predictors:
            model = left_out(group["score"], group[predictor.name], group["family"])
            about = {"score": score, "predictor": predictor.name, "kind": predictor.kind}
            rows.append(
                about
                | {
                    name: getattr(model, name)
                    for name in ("r2", "r2_left_out", "r2_left_out_family")
                }
            )
    return pd.DataFrame(rows)


def swapped_tasks(
    found: Observations, *, resamples: int = 1999
) -> dict[tuple[str, str, str], Correlation]:
    """The main predictor measured on the documents of one task against the score of another, by score, predictor, task."""
    single = found.frame[found.frame["task"] != "mean"]
    results = {}
    for score, group in single.groupby("score_of", sort=False):
        for task, other in single.groupby("task", sort=False):
            if task != group["task"].iloc[0]:
                pairs = (
                    group.set_index("label")["score"]
                    .to_frame()
                    .join(other.set_index("label")[found.main.name], how="inner")
                )
                results[score, found.main.name, task] = correlation(
                    pairs[found.main.name], pairs["score"], resamples=resamples
                )
    return results


def families(found: Observations) -> dict[tuple[str, str, str, str], FamilyEffect]:
    """The main predictor's coefficient where models come in families, alone and with the number of parameters."""
    results = {}
    for score, group in found.by_score():
        if not 1 < group["family"].nunique() < len(group):
            continue
        for covariates in dict.fromkeys(
            [(), tuple(c for c in found.covariates[:1] if c != found.main.name)]
        ):
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
