"""Saved runs as observations: one row per model for every score, with predictors and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.fit.other_tasks import OTHER_TASKS, add_other_tasks
from lm_eval_coupling.fit.predictors import (
    COVARIATES,
    Predictor,
    available_predictors,
    choose_predictors,
)
from lm_eval_coupling.fit.scores import some
from lm_eval_coupling.saved.names import is_checkpoint
from lm_eval_coupling.saved.shared_means import SharedMeans, mean_over_shared_items

LEAST = 3  # models; with fewer there is nothing to compare
_OUTPUT_TYPES = {
    "generate_until": "generation",
    "loglikelihood": "log-likelihood",
    "multiple_choice": "log-likelihood",
    "loglikelihood_rolling": "rolling",
}


@dataclasses.dataclass(frozen=True)
class Observations:
    """Scores and predictors of models that compare.

    ``frame`` has ``score_of`` (task and metric), ``model, label, family, tuned, score,
    score_error`` and the predictors, the one in question first; ``mean_of`` names the tasks of a
    mean. ``notes`` tell what was left out and what a reader must bear in mind.
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
        """Names of the scores, the mean last."""
        return list(dict.fromkeys(self.frame["score_of"]))

    @property
    def main_score(self) -> str:
        """The mean over tasks, or else the first score of which higher is better.

        It is one for which the predictor in question is known, if there is such a score.
        """
        of_main = {
            name: rows[self.main.name].notna().sum() >= LEAST for name, rows in self.compared()
        }
        compared = [name for name in of_main if of_main[name]] or list(of_main) or self.scores
        means = self.frame.loc[self.frame["task"] == "mean", "score_of"]
        if compared[-1] in set(means):
            return compared[-1]
        turned = set(self.frame.loc[self.frame["turned"].astype(bool), "score_of"])
        return next((name for name in compared if name not in turned), compared[0])

    def by_score(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield the rows of every score, in order."""
        for name in self.scores:
            yield name, self.frame[self.frame["score_of"] == name]

    def compared(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield the scores that at least 3 models have, with their rows."""
        for name, group in self.by_score():
            if group["score"].notna().sum() >= LEAST:
                yield name, group

    def of_kind(self, *kinds: str) -> list[Predictor]:
        """Return the predictors of these kinds."""
        return [predictor for predictor in self.predictors if predictor.kind in kinds]

    @property
    def models(self) -> int:
        """The number of models."""
        return self.frame["label"].nunique()

    @property
    def covariates(self) -> list[str]:
        """Facts about size that are known of every model and differ."""
        sizes = {predictor.name for predictor in self.of_kind("size")}
        return [name for name in COVARIATES if name in sizes and self.frame[name].notna().all()]


def observe(
    rows: pd.DataFrame, notes: list[str], *, x: Sequence[str] | None = None
) -> Observations:
    """Return observations of :func:`~.scores.scored_rows`: one per model and score that compares.

    The mean over the tasks that all models share is one more score.

    Args:
        rows: Scores, coupling and facts of each model and task.
        notes: Sentences about what was left out are added.
        x: Names of the predictors, the one in question first; by default coupling at its headline
            rank, then all others.

    Raises:
        CouplingError: If there is no such predictor.
    """
    rows = _distinct_weights(_last_checkpoints(rows, notes), notes)
    for lineage, own in rows.groupby("lineage", sort=False)["label"].unique().items():
        if len(own) > 1:
            notes.append(f"of {lineage} each counts as a model: {some(own)}")
    # Copies are dropped first: the other tasks' scores compare a model with the models that remain.
    rows = add_other_tasks(_distinct_numbers(rows, notes), notes)
    predictors = choose_predictors(rows, x, notes)
    # A model without a known family resembles no other.
    rows = rows.assign(family=rows["family"].fillna(rows["label"]))
    notes += _unknown(rows, predictors[0].name)
    frame = pd.concat([rows, *_mean_scores(rows, predictors, notes)], ignore_index=True)
    # A mean of all tasks has no others.
    frame.loc[frame["task"] == "mean", [*OTHER_TASKS]] = np.nan
    return Observations(frame, tuple(predictors), tuple(notes))


def _last_checkpoints(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Keep the last checkpoint of each training, or the finished model, in all of its tasks.

    A checkpoint of an unknown step is of a later stage of the training.

    Returns:
        The rows of the last of each training; of several where none is known to be later.
    """
    beyond = rows["revision"].map(is_checkpoint).map({True: 1e300, False: np.inf})
    order = rows["step"].fillna(beyond)
    is_last = order == order.groupby(rows["lineage"]).transform("max")
    last = rows[is_last]
    if is_last.all():
        return rows
    earlier = rows[~is_last]
    notes.append(
        f"of {earlier['lineage'].nunique()} models the last checkpoint counts, "
        f"{len(earlier)} rows do not"
    )
    have = set(zip(last["lineage"], last["task"], strict=True))
    pairs = dict.fromkeys(zip(earlier["lineage"], earlier["task"], strict=True))
    labels = dict(zip(last["lineage"], last["label"], strict=True))
    for lineage, task in pairs:
        if (lineage, task) not in have:
            notes.append(f"{labels.get(lineage, lineage)} has no {task}, an earlier checkpoint has")
    return last


def _distinct_weights(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Drop all but one name of the same weights, the same name for all tasks."""
    is_known = rows["fingerprint"].notna()
    of_name = rows.groupby(["fingerprint", "label"], dropna=False)
    ordered = rows.assign(
        documents=of_name["n_samples"].transform("sum"), newest=of_name["date"].transform("max")
    )
    ordered = ordered.sort_values(["documents", "newest", "date"])
    chosen = ordered.drop_duplicates(["fingerprint", "prompting", "task"], keep="last").index
    is_kept = ~is_known | rows.index.isin(chosen)
    if not is_kept.all():
        notes.append(
            f"the same weights under another name, counted once: {some(rows['label'][~is_kept])}"
        )
    return rows[is_kept]


def _distinct_numbers(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Drop models whose score and predictors equal another model's in every task, and note them.

    Weights saved again, in another file format for example, have another fingerprint. Distinct
    models may share a score and their sizes, so that a copy needs a measured number in every task.

    Returns:
        The rows with the first of equal models.
    """
    predictors = list(available_predictors(rows))
    measured = [p.name for p in predictors if p.error is not None]
    columns = ["score", *(p.name for p in predictors)]
    profiles: dict[tuple, list[str]] = {}
    for label, group in rows.groupby("label", sort=False):
        numbers = group.sort_values("task")
        values = numbers[columns].to_numpy(dtype=float)
        is_measured = numbers[measured].notna().any(axis=1)
        if np.isfinite(values[:, 0]).all() and is_measured.all():
            key = (*numbers["task"], *numbers["prompting"].map(str), values.tobytes())
            profiles.setdefault(key, []).append(str(label))
    copies = {copy: labels[0] for labels in profiles.values() for copy in labels[1:]}
    if not copies:
        return rows
    pairs = [f"{copy} (as {label})" for copy, label in copies.items()]
    notes.append(f"the same numbers to the last digit, counted once: {some(pairs)}")
    return rows[~rows["label"].isin(copies)]


def _unknown(rows: pd.DataFrame, predictor: str) -> Iterator[str]:
    for name in ("score", predictor):
        lacking = rows[rows[name].isna()]
        for score_of, group in lacking.groupby("score_of", sort=False):
            what = "score" if name == "score" else name
            yield f"{score_of}: no {what} of {some(group['label'])}, left out"


def _mean_scores(
    rows: pd.DataFrame, predictors: Sequence[Predictor], notes: list[str]
) -> Iterator[pd.DataFrame]:
    """Yield scores and predictors averaged over tasks, by output type and over all tasks."""
    types = rows["output_type"].map(_OUTPUT_TYPES)
    for kind in dict.fromkeys(types.dropna()) if types.nunique() > 1 else ():
        yield from _mean_score(rows[types == kind], predictors, f"{kind} scores", [])
    turned = rows["turned"].astype(bool)
    if turned.any() and not turned.all():  # an accuracy and a loss are not of one scale
        names = some(rows["score_of"][turned])
        notes.append(f"not in the mean of the scores, as lower is better: {names}")
        rows = rows[~turned]
    yield from _mean_score(rows, predictors, "scores", notes)


def _mean_score(
    rows: pd.DataFrame, predictors: Sequence[Predictor], name: str, notes: list[str]
) -> Iterator[pd.DataFrame]:
    if rows["score_of"].nunique() < 2:
        return
    main, *others = predictors
    errors = [p.error for p in predictors if p.error is not None and p.error in rows]
    mean = mean_over_shared_items(
        rows,
        unit="label",
        item="score_of",
        required=["score", main.name],
        optional=[p.name for p in others],
        errors=["score_error", *errors],
    )
    notes += _left_out_of_mean(mean, rows["score_of"].nunique())
    if mean.means.empty:
        return
    kept = rows[rows["label"].isin(mean.means.index) & rows["score_of"].isin(mean.items)]
    groups = kept.groupby("label", sort=False)
    averaged = mean.means.drop(columns="n")
    facts = groups.first().drop(columns=["score_of", "task", "metric"])
    facts = facts.drop(columns=[*averaged, "n_samples"], errors="ignore")
    about = pd.DataFrame(
        {
            "score_of": f"mean of {len(mean.items)} {name}",
            "task": "mean",
            "metric": "mean",
            "mean_of": "; ".join(dict.fromkeys(kept["task"])),
            # The mean rests on the documents of all of its tasks.
            "n_samples": groups["n_samples"].sum(min_count=1),
        }
    )
    parts = [part.reindex(averaged.index) for part in (facts, averaged, about)]
    # The copy is in one piece; pandas warns of frames of many pieces.
    yield pd.concat(parts, axis=1).copy().reset_index(names="label")


def _left_out_of_mean(mean: SharedMeans, number: int) -> Iterator[str]:
    def words(left_out: Mapping[str, tuple[str, ...]], problem: str) -> str:
        return some([f"{name} ({problem} {some(who)})" for name, who in left_out.items()], "; ")

    if mean.means.empty:
        yield "no mean of the scores, as models do not share two of them"
    elif mean.incomplete_items:
        left_out = words(mean.incomplete_items, "no score of")
        yield f"the mean is over {len(mean.items)} of {number} scores, without {left_out}"
    elif mean.incomplete_units:
        left_out = words(mean.incomplete_units, "has no")
        models = len(mean.means)
        yield f"not in the mean of {models} models, as a score is missing: {left_out}"
