"""Losses of the right answers: the rivals of every number that is read inside a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import SavedRun
from lm_eval_coupling.saved.values import mean_and_error

# With the direction in which each is expected to go with a score.
LOSSES = {"gold_answer_loss": -1, "gold_answer_margin": 1, "bits_per_byte": -1}


def add_losses(rows: pd.DataFrame, runs: Iterable[SavedRun]) -> pd.DataFrame:
    """Add the model's losses and their standard errors to the rows of ``load_runs``.

    ``gold_answer_loss`` is −log p of the right answer in nats per byte, the mean over documents.
    ``gold_answer_margin`` is its log-likelihood less that of the best wrong answer. Both need a
    task of choices whose samples were kept. ``bits_per_byte`` is the mean over the rolling tasks
    of the same run, given to every other task of it.

    Returns:
        As many rows, in their order, with these columns added.
    """
    by_file = {str(run.file): run for run in runs}
    names = ("gold_answer_loss", "gold_answer_margin")
    columns = [column for name in names for column in (name, f"{name}_stderr")]
    numbers = [_losses(by_file[row["file"]], row) for row in rows.to_dict("records")]
    losses = pd.DataFrame(numbers, rows.index, columns=columns)
    if "bits_per_byte,none" in rows:
        rolling = rows.groupby("file")["bits_per_byte,none"].transform("mean")
        losses["bits_per_byte"] = rolling.where(rows["bits_per_byte,none"].isna())
    return pd.concat([rows, losses.dropna(axis=1, how="all")], axis=1)


def _losses(run: SavedRun, row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return loss and margin of the right answers, each with its standard error."""
    metric = row["metric"]
    leaves = run.leaves.get(row["task"]) or [row["task"]]
    documents = [
        answer for leaf in leaves for answer in gold_answers(answers_of_run(run, leaf, metric, []))
    ]
    values = pd.DataFrame(documents, columns=["loss", "margin"], dtype=float)
    (loss, loss_error, _), (margin, margin_error, _) = (
        mean_and_error(values[name]) for name in values
    )
    return loss, loss_error, margin, margin_error


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
    """Return the log-likelihood of the right choice less that of the best wrong one.

    Returns:
        NaN where there is no wrong one.
    """
    wrong = [likelihood for i, (_, likelihood) in enumerate(options) if i != right]
    return options[right][1] - max(wrong) if wrong else math.nan
