"""Noise of the documents in predictors and scores, and correlations without it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lm_eval_coupling.fit.observations import Observations
from lm_eval_coupling.statistics import (
    Corrected,
    Correlation,
    Reliability,
    corrected_for_attenuation,
    document_reliability,
    reliability_from_errors,
)


def reliabilities(
    observations: Observations, documents: pd.DataFrame, leaves: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Reliability]:
    """Estimate the reliability of every predictor that documents have, and of the score.

    Args:
        observations: The observations.
        documents: Documents of all models, from
            :func:`~lm_eval_coupling.fit.within_models.load_documents`.
        leaves: Single tasks of each task or group.

    Returns:
        The reliabilities by score and predictor (``score`` for the score itself); none where
        there are no documents. A mean is over the tasks of its scores.
    """
    results: dict[tuple[str, str], Reliability] = {}
    if documents.empty:
        return results
    for score, group in observations.compared():
        roots = [group["task"].iloc[0]]
        if roots == ["mean"]:
            roots = group["mean_of"].iloc[0].split("; ")
        tasks = {leaf for root in roots for leaf in (root, *leaves.get(root, ()))}
        rows = documents[documents["task"].isin(tasks) & documents["model"].isin(group["label"])]
        names = [p.name for p in observations.predictors if p.name in rows]
        for name in [*names, *(["score"] if rows["score"].notna().any() else [])]:
            results[score, name] = document_reliability(
                rows.pivot_table(index="model", columns=["task", "doc_hash"], values=name)
            )
    return results


def corrected(
    observations: Observations,
    correlated: Mapping[tuple[str, str, str], Correlation],
    reliable: Mapping[tuple[str, str], Reliability],
) -> dict[tuple[str, str], Corrected]:
    """Estimate Pearson's correlations without the documents' noise.

    The reliability is that over shared documents where there are some, the score's stepped up to
    all documents that were scored. Without shared documents it comes from the standard errors.

    Returns:
        The corrected correlations by score and predictor, with a ``reason`` instead of numbers
        where a reliability is not estimable.
    """
    results: dict[tuple[str, str], Corrected] = {}
    for score, group in observations.compared():
        shared = _shared(reliable, score, "score")
        if shared is None:
            y = reliability_from_errors(group["score"], group["score_error"])
        else:
            y = _of_all_documents(shared, group["n_samples"].median())
        for predictor in [p for p in observations.predictors if p.error is not None]:
            shared = _shared(reliable, score, predictor.name)
            x = math.nan if shared is None else shared.alpha
            if shared is None and predictor.error in group:
                x = reliability_from_errors(group[predictor.name], group[predictor.error])
            pearson = correlated[score, predictor.name, "pearson"]
            results[score, predictor.name] = corrected_for_attenuation(pearson, x, y)
    return results


def _shared(
    reliable: Mapping[tuple[str, str], Reliability], score: str, name: str
) -> Reliability | None:
    """Return the reliability over shared documents; None where models share none."""
    result = reliable.get((score, name))
    return result if result and result.models > 2 and result.documents > 1 else None


def _of_all_documents(reliability: Reliability, documents: float) -> float:
    """Step the reliability up to more documents (Spearman and Brown)."""
    factor = max(1.0, documents / reliability.documents) if documents > 0 else 1.0
    return factor * reliability.alpha / (1 + (factor - 1) * reliability.alpha)
