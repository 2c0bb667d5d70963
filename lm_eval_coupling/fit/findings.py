"""From saved runs to an answer: does coupling go with the score, across models and within one over its documents?

:func:`fit_runs` assembles what :mod:`lm_eval_coupling.statistics` computes; every number is in one of ``Findings.tables``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.fit import across_models, document_noise, within_models
from lm_eval_coupling.fit import finding_text as words
from lm_eval_coupling.fit.checkpoint_curves import along_training, checkpoints
from lm_eval_coupling.fit.losses import add_losses
from lm_eval_coupling.fit.observations import Observations, observe
from lm_eval_coupling.fit.predictors import Predictor
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.scores_table import require_results, rows_of_runs
from lm_eval_coupling.statistics import Fit

__all__ = ["Findings", "Observations", "Predictor", "fit_runs"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """``words``: the finding, a paragraph each; ``notes``: what was left out; ``tables``: every number, by name.

    ``fits``: by score, predictor, form and whose errors, for drawing.
    """

    observations: Observations
    tables: Mapping[str, pd.DataFrame]
    fits: Mapping[tuple[str, str, str, str], Fit]
    words: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and what may make the numbers differ."""
        return self.observations.notes


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
    """Read saved runs and ask of them everything that they can answer.

    Args:
        paths: folders that lm-eval wrote, searched recursively.
        score: a metric such as ``acc_norm``; by default the one that lm-eval lists first for each task.
        x: names of the predictors, the one in question first; by default coupling at K = 10, then all others.
        tasks: tasks or groups; by default groups that have a score, and tasks in none of these.
        facts: CSV file with what is known of the models: family, tuned, training_tokens, others.
        mixed: ``refuse`` or ``keep`` runs of different settings.
        resamples: of permutation tests and bootstraps.

    Returns:
        The observations, every table that they allow, and in the notes what was left out and why.

    Raises:
        CouplingError: if there is nothing to compare, a name is unknown, or the runs do not compare.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found_runs = find_runs(paths)
    require_results(found_runs, paths)
    runs = rows_of_runs(found_runs.runs, mixed=mixed, facts=facts)
    notes = [f"passed over: {problem}" for problem in found_runs.passed_over]
    rows = scored_rows(runs, notes, score=score, tasks=tasks, mixed=mixed)
    rows = add_losses(rows, found_runs.runs)
    found = observe(rows, notes, x=x)
    main = found.main.name
    steps = checkpoints(rows, main)
    training = along_training(steps, main, resamples=resamples)
    tables = {"observations": found.frame, "checkpoints": steps}
    tables["training"] = across_models.table(training, "lineage", "score", "predictor", "of")
    read = within_models.load_documents(found_runs.runs, _leaves(runs, found, tasks, score), notes)
    below = {group: leaves for run in found_runs.runs for group, leaves in run.leaves.items()}
    tables_across, fits, said = _across(found, read, below, resamples)
    tables_within, said_within = _within(read, main)
    return Findings(
        Observations(found.frame, found.predictors, tuple(notes)),
        tables | tables_across | tables_within,
        fits,
        tuple([*said, *said_within, *words.about_training(training)]),
    )


def _across(
    found: Observations,
    documents: pd.DataFrame,
    leaves: Mapping[str, Sequence[str]],
    resamples: int,
) -> tuple[dict[str, pd.DataFrame], dict, list[str]]:
    if found.models < 2:
        return {}, {}, ["One model only: nothing to compare across models."]
    main = found.main.name
    correlated, fits = (
        across_models.correlations(found, resamples=resamples),
        across_models.fits(found),
    )
    compared, nested, families = (
        across_models.comparisons(found),
        across_models.nested(found),
        across_models.families(found),
    )
    reliable = document_noise.reliabilities(found, documents, leaves)
    corrected = document_noise.corrected(found, correlated, reliable)
    swapped = across_models.swapped_tasks(found, resamples=resamples)
    tables = {
        "correlations": across_models.correlation_table(correlated, found, resamples=resamples),
        "alone": across_models.alone(found),
        "reliability": across_models.table(reliable, "score", "predictor"),
        "corrected": across_models.table(corrected, "score", "predictor"),
        "swapped_tasks": across_models.table(swapped, "score", "predictor", "measured_on"),
        "fits": across_models.table(fits, "score", "predictor", "curve", "weights"),
        "subsets": across_models.subsets(found),
        "comparisons": across_models.comparison_table(compared),
        "nested": across_models.table(nested, "score", "predictor", "given"),
        "families": across_models.table(families, "score", "predictor", "given", "how"),
    }
    pearson = {
        (score, x): r
        for (score, x, method), r in correlated.items()
        if x == main and method == "pearson"
    }
    told: list[Mapping[Any, Any]] = [
        {key: fit for key, fit in fits.items() if key[1:] == (main, "exponential", "none")},
        {key: r for key, r in compared.items() if key[2] in found.covariates[:1]},
        nested,
        {key: r for key, r in families.items() if key[2:] == ("", "mixed")},
    ]
    said = words.about_models(found, pearson, told)
    last = found.scores[-1]
    said += words.about_many(tables["correlations"], last)
    said += words.about_rivals(
        {key[2]: r for key, r in compared.items() if key[0] == last}, main, last
    )
    said += words.about_noise(reliable.get((last, main)), corrected.get((last, main)), main, last)
    said += words.about_tasks(found, pearson, swapped)
    return tables, fits, said


def _within(read: pd.DataFrame, main: str) -> tuple[dict[str, pd.DataFrame], list[str]]:
    if read.empty or read["right"].isna().all():
        return {}, [
            "Within models nothing was asked: of no measured document is there an answer that is right or wrong (it needs "
            "lm-eval's --log_samples, and a task that has such answers)."
        ]
    predictors = within_models.document_predictors(read, main)
    aurocs = within_models.aurocs(read, [*predictors, *within_models.yardsticks(read)])
    logistics = within_models.logistics(read, predictors)
    tables = {
        "documents": read,
        "auroc": within_models.auroc_table(aurocs),
        "logistic": across_models.table(logistics, "model", "task", "predictor", "given"),
        "graded": across_models.table(
            within_models.graded(read, predictors), "model", "task", "predictor", "of"
        ),
        "calibration": within_models.calibration(read, predictors[0]),
    }
    return tables, words.about_documents(aurocs, logistics, predictors[0])


def _leaves(
    runs: pd.DataFrame, found: Observations, tasks: Sequence[str] | None, score: str | None
) -> pd.DataFrame:
    """The rows of single tasks, of the models that were compared: documents belong to these, not to groups."""
    frame = found.frame
    own = dict(zip(zip(frame["file"], frame["task"], strict=True), frame["label"], strict=True))
    of_file = (
        frame.drop_duplicates("file").set_index("file")["label"].to_dict()
    )  # of the tasks of a group
    places = zip(runs["file"], runs["task"], strict=True)
    rows = runs.assign(label=[own.get(place, of_file.get(place[0])) for place in places])
    rows = rows[rows["label"].notna() & ~rows["is_group"]]
    if tasks is not None:
        above = dict(zip(runs["task"], runs["group"], strict=True))
        rows = rows[[not set(tasks).isdisjoint(_ancestors(task, above)) for task in rows["task"]]]
    return (
        rows
        if score is None
        else rows.assign(metric=[_named(row, score) for row in rows.to_dict("records")])
    )


def _ancestors(task: str, above: Mapping[str, str]) -> list[str]:
    line = [task]
    while (parent := above.get(line[-1])) and parent not in line:
        line.append(parent)
    return line


def _named(row: Mapping[str, Any], score: str) -> str | None:
    """The metric of this row that is meant, or the one lm-eval lists first."""
    named = [name for name in row if name == score or str(name).startswith(f"{score},")]
    return next((name for name in named if pd.notna(row[name])), row["metric"])
