"""Saved runs as observations: for every score one row per model, with all predictors and the errors of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.fit.predictors import COVARIATES, Predictor, choose_predictors
from lm_eval_coupling.fit.scores import some

_TYPES = {
    "generate_until": "generation",
    "loglikelihood": "log-likelihood",
    "multiple_choice": "log-likelihood",
}
_TYPES |= {"loglikelihood_rolling": "rolling"}


@dataclasses.dataclass(frozen=True)
class Observations:
    """``frame`` has ``score_of`` (task and metric), ``model, label, family, tuned, score, score_error`` and predictors.

    ``main`` is the predictor in question; ``notes`` say what was left out and what a reader must bear in mind.
    """

    frame: pd.DataFrame
    predictors: tuple[Predictor, ...]
    notes: tuple[str, ...]

    @property
    def main(self) -> Predictor:
        """The predictor in question."""
        return self.predictors[0]

    @property
    def scores(self) -> list[str]:
        """Their names, the mean last."""
        return list(dict.fromkeys(self.frame["score_of"]))

    def by_score(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """The rows of every score, in order."""
        for name in self.scores:
            yield name, self.frame[self.frame["score_of"] == name]

    def of_kind(self, *kinds: str) -> list[Predictor]:
        """The predictors of these kinds."""
        return [predictor for predictor in self.predictors if predictor.kind in kinds]

    @property
    def models(self) -> int:
        """How many there are."""
        return self.frame["label"].nunique()

    @property
    def covariates(self) -> list[str]:
        """Facts about size that are known of every model and differ."""
        sizes = {predictor.name for predictor in self.of_kind("size")}
        return [name for name in COVARIATES if name in sizes and self.frame[name].notna().all()]


def observe(
    rows: pd.DataFrame, notes: list[str], *, x: Sequence[str] | None = None
) -> Observations:
    """Make observations of :func:`~.scores.scored_rows`: one per model, and the mean of the scores as one more score.

    Args:
        rows: what is known of each model and task.
        notes: what was left out is added here.
        x: names of the predictors, the one in question first; by default coupling at its headline rank, then all others.

    Returns:
        What of the rows can be compared, with its predictors and notes.

    Raises:
        CouplingError: if there is no such predictor.
    """
    rows = _distinct_weights(_last_checkpoints(rows, notes), notes)
    predictors = choose_predictors(rows, x, notes)
    frame = pd.concat([rows, *_mean_score(rows, predictors, notes)], ignore_index=True)
    return Observations(frame, tuple(predictors), tuple(notes))


def _last_checkpoints(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Checkpoints of one training are no models of their own: the last one counts, or the finished model."""
    order = rows["step"].fillna(np.inf)
    last = order == order.groupby([rows["lineage"], rows["task"], rows["prompting"]]).transform(
        "max"
    )
    if not last.all():
        notes.append(
            f"of {rows['lineage'][~last].nunique()} models the last checkpoint counts, {(~last).sum()} rows do not"
        )
    return rows[last]


def _distinct_weights(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The same weights under two names are one model, not two."""
    known = rows["fingerprint"].notna()
    of_name = rows.groupby(
        ["fingerprint", "label"], dropna=False
    )  # one name for all tasks that it has, or means lack some
    ordered = rows.assign(
        documents=of_name["n_samples"].transform("sum"), newest=of_name["date"].transform("max")
    )
    ordered = ordered.sort_values(["documents", "newest", "date"])
    chosen = ordered.drop_duplicates(["fingerprint", "prompting", "task"], keep="last").index
    kept = ~known | rows.index.isin(chosen)
    if not kept.all():
        notes.append(
            f"the same weights under another name, counted once: {some(rows['label'][~kept])}"
        )
    return rows[kept]


def _mean_score(
    rows: pd.DataFrame, predictors: Sequence[Predictor], notes: list[str]
) -> Iterator[pd.DataFrame]:
    """Scores and predictors averaged over tasks, for the models that have them all: by output type, then all of them."""
    types = rows["output_type"].map(_TYPES)
    for kind in dict.fromkeys(types.dropna()) if types.nunique() > 1 else ():
        if (of := rows[types == kind])["score_of"].nunique() > 1:
            yield from _mean_of(of, predictors, f"{kind} scores", [])
    turned = rows["turned"]
    if turned.any() and not turned.all():  # an accuracy and a loss are not of one scale
        notes.append(
            f"not in the mean of the scores, as lower is better: {some(rows['score_of'][turned])}"
        )
        rows = rows[~turned]
    if rows["score_of"].nunique() > 1:
        yield from _mean_of(rows, predictors, "scores", notes)


def _mean_of(
    rows: pd.DataFrame, predictors: Sequence[Predictor], what: str, notes: list[str]
) -> Iterator[pd.DataFrame]:
    number = rows["score_of"].nunique()
    complete = rows.groupby("label")["score_of"].transform("nunique") == number
    if not complete.all():
        notes.append(
            f"not in the mean, as a score is missing: {some(sorted(set(rows['label'][~complete])))}"
        )
    if not complete.any():
        return
    groups = rows[complete].groupby("label", sort=False)
    averaged: dict[str, pd.Series] = {}
    for value, error in [("score", "score_error"), *((p.name, p.error) for p in predictors)]:
        averaged[value] = groups[value].mean()
        if error is not None and error in rows:
            averaged[error] = groups[error].agg(
                lambda e: np.sqrt((e**2).sum(skipna=False)) / len(e)
            )
    rest = groups.first().drop(columns=[*averaged, "score_of", "task", "metric"])
    about = {"score_of": f"mean of {number} {what}", "task": "mean", "metric": "mean"}
    told = {name: pd.Series(value, rest.index) for name, value in about.items()}
    yield (
        pd.concat([rest, pd.DataFrame(averaged | told)], axis=1).copy().reset_index()
    )  # of many pieces: pandas warns
