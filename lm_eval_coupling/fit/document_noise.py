"""How much of what a predictor and a score say is the documents' noise: reliability, and correlations without it."""

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
    found: Observations, documents: pd.DataFrame, leaves: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Reliability]:
    """Of every predictor that documents have, and of the score itself (``score``), by score and predictor.

    Args:
        found: the observations.
        documents: of all models, as :func:`~lm_eval_coupling.fit.within_models.load_documents` reads them.
        leaves: single tasks of each task or group; a mean is of all of them.

    Returns:
        The reliabilities; none where there are no documents.
    """
    results: dict[tuple[str, str], Reliability] = {}
    if documents.empty:
        return results
    for score, group in found.by_score():
        task = group["task"].iloc[0]
        tasks = set(documents["task"]) if task == "mean" else {task, *leaves.get(task, ())}
        of = documents[documents["task"].isin(tasks) & documents["model"].isin(group["label"])]
        names = [p.name for p in found.predictors if p.name in of]
        for name in [*names, *(["score"] if of["score"].notna().any() else [])]:
            results[score, name] = document_reliability(
                of.pivot_table(index="model", columns=["task", "doc_hash"], values=name)
            )
    return results


def corrected(
    found: Observations,
    correlated: Mapping[tuple[str, str, str], Correlation],
    reliable: Mapping[tuple[str, str], Reliability],
) -> dict[tuple[str, str], Corrected]:
    """Pearson's correlation of each predictor with each score, without the documents' noise, by score and predictor.

    Reliability is that over shared documents where there are some (the score's stepped up to all documents that were
    scored), or else what the standard errors say.

    Returns:
        With a ``reason`` instead of numbers where a reliability is not known.
    """
    results: dict[tuple[str, str], Reliability] = {}
    for score, group in found.by_score():
        of_score = reliable.get((score, "score"), Reliability())
        y = _stepped_up(of_score, group["n_samples"].median())
        y = reliability_from_errors(group["score"], group["score_error"]) if math.isnan(y) else y
        for predictor in [p for p in found.predictors if p.error is not None]:
            x = reliable.get((score, predictor.name), Reliability()).alpha
            if math.isnan(x) and predictor.error in group:
                x = reliability_from_errors(group[predictor.name], group[predictor.error])
            results[score, predictor.name] = corrected_for_attenuation(
                correlated[score, predictor.name, "pearson"],
                max(0.0, x) if not math.isnan(x) else x,
                y,
            )
    return results


def _stepped_up(found: Reliability, documents: float) -> float:
    """Spearman and Brown's reliability of a mean over more documents."""
    factor = documents / found.documents if found.documents else math.nan
    return factor * found.alpha / (1 + (factor - 1) * found.alpha) if found.alpha > 0 else math.nan
