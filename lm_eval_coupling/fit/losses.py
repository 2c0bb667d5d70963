"""Losses of the right answers: the rivals of every number that is read inside a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.values import mean_and_error

# With the direction in which each is expected to go with a score.
LOSSES = {"gold_answer_loss": -1, "gold_answer_margin": 1, "bits_per_byte": -1}


def add_losses(rows: pd.DataFrame, runs: Iterable[SavedRun], notes: list[str]) -> pd.DataFrame:
    """Return ``rows`` with the model's losses and their standard errors added.

    ``gold_answer_loss`` is −log p of the right answer in nats per byte, the mean over documents.
    ``gold_answer_margin`` is its log-likelihood less that of the best wrong answer. Both need a
    task of choices whose samples were kept, and are over the same ``gold_answer_n`` documents for
    all rows of a task. ``bits_per_byte`` is the mean over the rolling tasks that all runs with
    such tasks have, given to every other task of the run.

    Args:
        rows: of the compared runs.
        runs: the runs with their samples.
        notes: sentences are added on tasks of which a run lacks answers that others have, and on
            samples and losses that are not as lm-eval writes them.
    """
    by_file = {str(run.file): run for run in runs}
    names = ("gold_answer_loss", "gold_answer_margin")
    columns = [column for name in names for column in (name, f"{name}_stderr")]
    losses = pd.DataFrame(math.nan, rows.index, [*columns, "gold_answer_n"])
    for task, of_task in rows.groupby("task", sort=False):
        answers = [_answers(by_file[row["file"]], row, notes) for row in of_task.to_dict("records")]
        shared = _shared_documents(answers, str(task), notes)
        for index, own in zip(of_task.index, answers, strict=True):
            if shared and own.keys() >= shared:
                numbers = pd.DataFrame([own[document] for document in shared])
                parts = [mean_and_error(numbers[column])[:2] for column in numbers]
                losses.loc[index] = [*parts[0], *parts[1], len(shared)]
    if "bits_per_byte,none" in rows:
        losses["bits_per_byte"] = _bits_per_byte(rows, notes)
    return pd.concat([rows, losses.dropna(axis=1, how="all")], axis=1)


def _bits_per_byte(rows: pd.DataFrame, notes: list[str]) -> pd.Series:
    """Return the mean bits per byte of each row's run, over the rolling tasks that all runs have.

    A rolling task itself has none: its own loss would predict it.
    """
    rolling = rows[rows["bits_per_byte,none"].notna()]
    is_possible = (rolling["bits_per_byte,none"] >= 0) & (rolling["bits_per_byte,none"] < math.inf)
    for row in rolling[~is_possible].to_dict("records"):
        notes.append(
            f"got {row['file']} with {row['bits_per_byte,none']:g} bits per byte of {row['task']}, "
            "expected a finite number from 0 on; it is left out"
        )
    rolling = rolling[is_possible]
    tasks = rolling.groupby("file")["task"].agg(set)
    shared = set.intersection(*tasks) if len(tasks) else set()
    if lacking := sorted(set(rolling["task"]) - shared):
        notes.append(f"bits_per_byte is without {', '.join(lacking)}, which some runs lack")
    rolling = rolling[rolling["task"].isin(shared)]
    means = rolling.groupby("file")["bits_per_byte,none"].mean()
    return rows["file"].map(means).where(rows["bits_per_byte,none"].isna())


def _answers(
    run: SavedRun, row: Mapping[str, Any], notes: list[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return loss and margin of the right answers of a run, by single task and document."""
    return {
        (leaf, sys.intern(document)): numbers
        for leaf in run.leaves.get(row["task"]) or [row["task"]]
        for document, answer in answers_of_run(run, leaf, row["metric"], notes).items()
        for numbers in gold_answers({document: answer})
    }


def _shared_documents(
    answers: Sequence[Mapping[tuple[str, str], Any]], task: str, notes: list[str]
) -> set[tuple[str, str]]:
    """Return the single tasks and documents that runs have in common.

    Runs with answers to less than half as many documents as another run do not narrow the choice.

    Args:
        answers: of each run, by single task and document.
        task: name for the note.
        notes: a sentence is added if a run has answers to other documents as well.
    """
    most = max(map(len, answers), default=0)
    kept = [own.keys() for own in answers if 2 * len(own) >= most > 0]
    shared = set.intersection(*map(set, kept)) if kept else set()
    if any(len(own) != len(shared) for own in answers if own):
        notes.append(
            f"losses of the right answers of {task} are over the {len(shared)} documents that "
            f"{len(kept)} of {len(answers)} runs have in common, of up to {most}"
        )
    return shared


def gold_answers(answers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield loss per byte and margin of every document whose right choice is known."""
    for answer in answers.values():
        options, sizes = answer.get("options") or (), answer.get("bytes") or ()
        right = right_choice(options, answer.get("expected"), answer.get("right"))
        if right is not None and sizes[right]:
            yield -options[right][1] / sizes[right], margin_of(options, right)


def right_choice(
    options: Sequence[tuple[str, float]], expected: str | None, right: bool | None
) -> int | None:
    """Return the index of the right choice; None where none, or more than one, is right.

    Winogrande's target names neither of its two choices; there the score tells which was right.
    """
    named = [i for i, (text, _) in enumerate(options) if text == expected]
    if len(named) == 1 and len(options) > 1:
        return named[0]
    if len(options) == 2 and not named and right is not None:
        best = max(range(2), key=lambda i: options[i][1])
        return best if right else 1 - best
    return None


def margin_of(options: Sequence[tuple[str, float]], right: int) -> float:
    """Return the log-likelihood of the right choice less that of the best wrong one, or NaN."""
    wrong = [likelihood for i, (_, likelihood) in enumerate(options) if i != right]
    return options[right][1] - max(wrong) if wrong else math.nan
