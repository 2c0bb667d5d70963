"""From saved runs to an answer: whether coupling goes with the score.

:func:`fit_runs` assembles what :mod:`lm_eval_coupling.statistics` computes, across models and
within each model over its documents. Every number is in one of ``Findings.tables``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.fit import across_models, document_noise, finding_text, within_models
from lm_eval_coupling.fit.across_models import table
from lm_eval_coupling.fit.answers_text import describe_documents
from lm_eval_coupling.fit.checkpoint_curves import along_training, checkpoints
from lm_eval_coupling.fit.losses import add_losses
from lm_eval_coupling.fit.observations import LEAST, Observations, observe
from lm_eval_coupling.fit.predictors import Predictor
from lm_eval_coupling.fit.scores import groups_of_tasks, scored_rows
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.scores_table import require_results, rows_of_runs
from lm_eval_coupling.statistics import Correlation, Fit
from lm_eval_coupling.statistics.sentences import is_beyond_chance

__all__ = ["Findings", "Observations", "Predictor", "fit_runs"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """The finding with every number that it rests on.

    ``words`` is the finding, a paragraph each, and ``notes`` tell what was left out. ``tables``
    have every number, by name. ``fits`` are for drawing, by score, predictor, form and used
    errors.
    """

    observations: Observations
    tables: Mapping[str, pd.DataFrame]
    fits: Mapping[tuple[str, str, str, str], Fit]
    words: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was left out, and on what may make the numbers differ."""
        return self.observations.notes


@dataclasses.dataclass(frozen=True)
class _Part:
    """Tables, fits and paragraphs of one question."""

    tables: Mapping[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    fits: Mapping[tuple[str, str, str, str], Fit] = dataclasses.field(default_factory=dict)
    words: Sequence[str] = ()


def fit_runs(
    paths: Path | str | Iterable[Path | str],
    *,
    score: str | None = None,
    x: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    facts: Path | str | None = None,
    mixed: str = "refuse",
    resamples: int = 1999,
) -> Findings:
    """Read saved runs and answer all questions that they allow.

    Args:
        paths: Folders that lm-eval wrote, searched recursively.
        score: A metric such as ``acc_norm``; by default the one that lm-eval lists first for each
            task.
        x: Names of the predictors, the one in question first; by default coupling at K = 10, then
            all others.
        tasks: Tasks or groups; by default groups that have a score, and tasks in none of these.
        facts: CSV file of facts about the models: family, tuned, training_tokens, others.
        mixed: ``refuse`` or ``keep`` runs of different settings.
        resamples: Number of permutations of each test.

    Returns:
        The observations, every table that they allow, and notes on what was left out and why.

    Raises:
        CouplingError: If there is nothing to compare, a name is unknown, or the runs do not
            compare.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    saved = find_runs(paths)
    require_results(saved, paths)
    runs = rows_of_runs(saved.runs, mixed=mixed, facts=facts)
    notes = [f"passed over: {problem}" for problem in saved.passed_over]
    rows = scored_rows(runs, notes, score=score, tasks=tasks, mixed=mixed)
    rows = add_losses(rows, saved.runs, notes)
    observations = observe(rows, notes, x=x)
    main = observations.main.name
    steps = checkpoints(rows, main, notes)
    training = along_training(steps, main, resamples=resamples)
    with_documents = _single_tasks(runs, observations, tasks, score)
    documents = within_models.load_documents(saved.runs, with_documents, notes)
    leaves = {group: members for run in saved.runs for group, members in run.leaves.items()}
    across = _across(observations, documents, leaves, resamples)
    within = _within(documents, main)
    tables = {
        "observations": observations.frame,
        "checkpoints": steps,
        "training": table(training, "lineage", "score", "predictor", "of"),
    }
    return Findings(
        dataclasses.replace(observations, notes=tuple(dict.fromkeys(notes))),
        {**tables, **across.tables, **within.tables},
        across.fits,
        (*across.words, *within.words, *finding_text.describe_training(training)),
    )


def _nothing_to_compare(observations: Observations) -> str | None:
    if observations.models == 1:
        return "One model only: nothing to compare across models."
    if not any(True for _ in observations.compared()):
        return f"No score of {LEAST} models or more: nothing to compare across models."
    return None


def _across(
    observations: Observations,
    documents: pd.DataFrame,
    leaves: Mapping[str, Sequence[str]],
    resamples: int,
) -> _Part:
    """Compute all tables across models, and the paragraphs about them."""
    if problem := _nothing_to_compare(observations):
        return _Part(words=[problem])
    main, last = observations.main.name, observations.main_score
    correlated = across_models.correlations(observations, resamples=resamples)
    fits = across_models.fits(observations)
    compared = across_models.comparisons(observations, resamples=resamples)
    nested = across_models.nested(observations, resamples=resamples)
    within = across_models.within_families(observations, resamples=resamples)
    influences = across_models.influences(observations, correlated, resamples=min(resamples, 999))
    reliable = document_noise.reliabilities(observations, documents, leaves)
    corrected = document_noise.corrected(observations, correlated, reliable)
    swapped = across_models.swapped_tasks(observations, resamples=resamples)
    families = across_models.families(observations)
    rows = across_models.correlation_table(correlated, observations, resamples=resamples)
    tables = {
        "correlations": rows,
        "alone": across_models.alone(observations),
        "reliability": table(reliable, "score", "predictor"),
        "corrected": table(corrected, "score", "predictor"),
        "swapped_tasks": table(swapped, "score", "predictor", "measured_on"),
        "fits": table(fits, "score", "predictor", "curve", "weights"),
        "subsets": across_models.subsets(observations),
        "influence": influences,
        "comparisons": across_models.comparison_table(compared),
        "nested": table(nested, "score", "predictor", "given"),
        "families": table(families, "score", "predictor", "given", "how"),
        "within_families": table(within, "score", "predictor"),
    }
    pearson = {score: correlated[score, main, "pearson"] for score, _ in observations.compared()}
    rivals = {other: r for (score, _, other), r in compared.items() if score == last}
    size = next(filter(rivals.__contains__, observations.covariates), None)
    results = finding_text.MainResults(
        pearson=pearson[last],
        fits={form: fits[last, main, form, "none"] for form in ("line", "exponential")},
        within_families=within.get((last, main)),
        against_size=None if size is None else (size, rivals[size]),
        nested=[r for (score, *_), r in nested.items() if score == last],
        influence=influences[influences["score"] == last] if len(influences) else influences,
    )
    key = (last, main)
    beyond_chance = {score: _beyond_chance(rows, correlated, score) for score in pearson}
    words = [
        *finding_text.describe_models(observations, pearson, results),
        *finding_text.describe_predictors(rows, correlated, last, beyond_chance[last]),
        *finding_text.describe_rivals(rivals, main, last, beyond_chance[last], described=size),
        *finding_text.describe_other_tasks(nested, beyond_chance),
        *finding_text.describe_noise(reliable.get(key), corrected.get(key), main, last),
        *finding_text.describe_tasks(main, pearson, swapped),
    ]
    return _Part(tables, fits, words)


def _beyond_chance(
    rows: pd.DataFrame, correlated: Mapping[tuple[str, str, str], Correlation], score: str
) -> dict[str, bool]:
    """Return whether each predictor's correlation with the score is beyond chance.

    The score is one of several, so that p is adjusted for their number.
    """
    of_score = rows[(rows["score"] == score) & (rows["method"] == "pearson")]
    return {
        name: is_beyond_chance(correlated[score, name, "pearson"], p)
        for name, p in zip(of_score["predictor"], of_score["p_holm"], strict=True)
    }


def _within(documents: pd.DataFrame, main: str) -> _Part:
    if documents.empty or documents["right"].isna().all():
        return _Part(
            words=[
                "Within models nothing can be tested: no measured document has an answer that is "
                "right or wrong (it needs lm-eval's --log_samples, and a task with such answers)."
            ]
        )
    predictors = within_models.document_predictors(documents, main)
    yardsticks = within_models.yardsticks(documents)
    aurocs = within_models.aurocs(documents, [*predictors, *yardsticks])
    logistics = within_models.logistics(documents, predictors)
    graded = within_models.graded(documents, predictors)
    tables = {
        "documents": documents,
        "auroc": within_models.auroc_table(aurocs),
        "logistic": table(logistics, "model", "task", "predictor", "given"),
        "graded": table(graded, "model", "task", "predictor", "of"),
        "calibration": within_models.calibration(documents, predictors[0]),
    }
    words = describe_documents(aurocs, logistics, predictors[0])
    return _Part(tables, words=words)


def _single_tasks(
    runs: pd.DataFrame,
    observations: Observations,
    tasks: Sequence[str] | None,
    score: str | None,
) -> pd.DataFrame:
    """Return the rows of the compared models' tasks that are no groups, with ``label``.

    Args:
        runs: one row per file and task or group.
        observations: the compared models; a row has the label of its file there.
        tasks: tasks to keep, or groups whose tasks to keep; None for all.
        score: metric of the documents, where a row has it, put into ``metric``; by default the
            one that lm-eval lists first.
    """
    frame = observations.frame
    label_at = dict(
        zip(zip(frame["file"], frame["task"], strict=True), frame["label"], strict=True)
    )
    # Tasks of a group have no row of their own in the observations.
    label_of_file = frame.drop_duplicates("file").set_index("file")["label"].to_dict()
    places = zip(runs["file"], runs["task"], strict=True)
    rows = runs.assign(label=[label_at.get(place, label_of_file.get(place[0])) for place in places])
    rows = rows[rows["label"].notna() & ~rows["is_group"]]
    if tasks is not None:
        above = groups_of_tasks(runs)
        rows = rows[[not {task, *above[task]}.isdisjoint(tasks) for task in rows["task"]]]
    if score is None:
        return rows
    return rows.assign(metric=[_metric(row, score) for row in rows.to_dict("records")])


def _metric(row: Mapping[str, Any], score: str) -> str | None:
    """Return the metric of this row that ``score`` names, or the one that lm-eval lists first."""
    named = [name for name in row if name == score or str(name).startswith(f"{score},")]
    return next((name for name in named if pd.notna(row[name])), row["metric"])
