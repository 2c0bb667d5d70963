"""Rows of saved runs that are compared, and their scores.

A larger score is better, and no error is zero.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.registry import prompt_readings
from lm_eval_coupling.saved.names import label_rows
from lm_eval_coupling.saved.prompting import differing, find_disagreements
from lm_eval_coupling.saved.task_rows import is_score
from lm_eval_coupling.statistics import proportion_error

_LOWER_IS_BETTER = re.compile(
    r"perplexity|bits_per_byte|brier|mse|error"
    r"|(?<![a-z])(?:ter|wer|cer|ece|nll|ppl|loss|bias)(?![a-z])"
)
_LOGARITHMS = {"log10_params": "n_params", "log10_training_tokens": "training_tokens"}
_FLOPS_PER_TOKEN = 6  # of training, per parameter


def scored_rows(
    runs: pd.DataFrame,
    notes: list[str],
    *,
    score: str | None = None,
    tasks: Sequence[str] | None = None,
    mixed: str = "refuse",
) -> pd.DataFrame:
    """Return the rows of ``load_runs`` that have coupling and a score, one per model and task.

    They have ``score, score_error, score_of, label`` and the sizes of the models.

    Args:
        runs: The run that counts of every model and task.
        notes: Sentences about what was left out are added.
        score: A metric such as ``acc_norm`` or ``exact_match,strict-match``; by default the one
            that lm-eval lists first.
        tasks: The tasks or groups to use; by default groups that have a score, and tasks in none
            of these.
        mixed: ``refuse`` or ``keep`` scores of different few-shot counts or task versions.

    Raises:
        CouplingError: If nothing is left, a name is unknown, or the scores of a task do not
            compare.
    """
    rows = _chosen_tasks(runs, tasks)
    rows = _with_coupling(rows.assign(label=label_rows(rows)), notes)
    rows = _of_equal_parts(rows, notes)
    _require_comparable(rows, mixed)
    notes += _differences(rows)
    rows = _with_scores(rows, score, notes)
    sizes = {
        name: np.log10(rows[column].where(rows[column] > 0)) for name, column in _LOGARITHMS.items()
    }
    sizes["log10_compute"] = (
        np.log10(_FLOPS_PER_TOKEN) + sizes["log10_params"] + sizes["log10_training_tokens"]
    )
    if taken := [name for name in sizes if name in rows]:
        raise CouplingError(
            f"got a fact {taken[0]}, which fit derives from n_params and training_tokens; "
            "give these, or rename the column"
        )
    return pd.concat([rows, pd.DataFrame(sizes, rows.index)], axis=1)


def _chosen_tasks(runs: pd.DataFrame, tasks: Sequence[str] | None) -> pd.DataFrame:
    if tasks is None:
        return runs[_on_top(runs)]
    if unknown := [task for task in tasks if task not in set(runs["task"])]:
        there = ", ".join(sorted(set(runs["task"])))
        raise CouplingError(f"got no task {unknown[0]!r}, expected one of {there}")
    return runs[runs["task"].isin(tasks)]


def _on_top(runs: pd.DataFrame) -> list[bool]:
    """Return whether each row is a group that has a score, or a task that is in none of these.

    A task counts with a group of the same weights in whichever run that was evaluated: a subject
    that was run again alone is still a part of it.
    """
    names = ("model", "revision", "variant", "dtype", "fingerprint")
    weights = list(zip(*(runs[name].fillna("") for name in names), strict=True))
    tasks, has_score = runs["task"].tolist(), runs["metric"].notna().tolist()
    is_group = runs["is_group"].tolist()
    keys = list(zip(weights, tasks, strict=True))
    scored = {key for key, group, has in zip(keys, is_group, has_score, strict=True) if group & has}
    above = groups_of_tasks(runs)
    return [
        (key in scored or not group)
        and not any((key[0], parent) in scored for parent in above[key[1]])
        for key, group in zip(keys, is_group, strict=True)
    ]


def groups_of_tasks(runs: pd.DataFrame) -> dict[str, set[str]]:
    """Map every task to all groups that it is in, directly or not, in whichever of the runs."""
    above: dict[str, set[str]] = {}
    for task, groups in zip(runs["task"], runs["groups"], strict=True):
        above.setdefault(task, set()).update(groups)
    return above


def _with_coupling(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Leave out models without coupling, so that predictors are compared over the same models."""
    measured = rows["measured"] > 0
    if not measured.any():
        raise CouplingError(
            "got runs without coupling only; evaluate the models with --model coupling-hf, or see "
            "by `lm-eval-coupling show` why none of their documents could be measured"
        )
    if without := sorted(set(rows["label"]) - set(rows["label"][measured])):
        notes.append(f"without coupling and left out: {some(without)}")
    if interrupted := sorted(set(rows["label"][rows["interrupted"] & measured])):
        notes.append(f"measured in part only, as their runs were interrupted: {some(interrupted)}")
    return rows[measured]


def _of_equal_parts(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the rows, without coupling where a model has other tasks of a group than most models.

    The mean over other tasks is another number: of two tasks, that of the easy one alone.
    """
    readings = {reading.name for reading in prompt_readings()} | {"coupling_excess"}
    columns = [name for name in rows if name.partition("@")[0].removesuffix("_stderr") in readings]
    rows = rows.copy()
    for task, group in rows.groupby("task", sort=False):
        parts = group["measured_tasks"].map(frozenset)
        counts = Counter(parts)
        most = max(counts, key=lambda tasks: (counts[tasks], len(tasks)))
        other = group[parts != most]
        for label, own in zip(other["label"], other["measured_tasks"], strict=True):
            notes.append(
                f"no coupling of {label} for {task}: it is over {some(own)}, that of other models "
                f"over {some(sorted(most))}"
            )
        rows.loc[other.index, columns] = math.nan
    return rows


def _require_comparable(rows: pd.DataFrame, mixed: str) -> None:
    """Raise CouplingError if prompts or answers differ in kind, unless ``mixed`` keeps them."""
    if mixed != "refuse":
        return
    _require_one_way_of_prompting(rows)
    for task, group in rows.groupby("task", sort=False):
        ways = group.drop_duplicates("prompting")
        for difference in find_disagreements(ways["prompting"].tolist()):
            first, other = (ways["file"].iloc[n] for n in (difference.first, difference.second))
            kind = "few-shot examples" if difference.kind == "shots" else difference.kind
            one, two = (part or f"no {kind}" for part in difference.parts)
            raise CouplingError(
                f"got {task} with different {kind}: {one} and {two} ({first} and {other}), whose "
                "scores do not compare; give runs made alike, choose other tasks, or pass "
                "mixed='keep' (--mixed keep)"
            )


def _require_one_way_of_prompting(rows: pd.DataFrame) -> None:
    """Raise CouplingError for a model whose prompts of one task were made in several ways."""
    weights = [
        rows[name].fillna("") for name in ("model", "revision", "variant", "fingerprint", "task")
    ]
    for (model, *_, task), group in rows.groupby(weights, sort=False):
        descriptions = differing(group["prompting"].unique())
        if len(descriptions) > 1:
            ways = " and ".join(words or "without" for words in descriptions.values())
            raise CouplingError(
                f"got {task} of {model} with different prompts ({ways}); give runs made alike, or "
                "pass mixed='keep' (--mixed keep) to have each counted"
            )


def _differences(rows: pd.DataFrame) -> list[str]:
    """Describe what may make scores or coupling of models differ, but need not."""
    columns = {
        "n_samples": "numbers of documents",
        "measured": "numbers of measured documents",
        "chat_template": "use of a chat template",
        "dtype": "dtype",
    }
    notes = []
    for column, what in columns.items():
        differ = rows.groupby("task")[column].nunique() > 1
        if differ.any():
            notes.append(f"models differ in the {what} of {some(differ.index[differ])}")
    kinds: dict[str, list[str]] = {}
    for task, descriptions in rows.groupby("task", sort=False)["prompting"].unique().items():
        ways = list(descriptions)
        for difference in [*find_disagreements(ways), *find_disagreements(ways, of_the_model=True)]:
            kinds.setdefault(difference.kind, []).append(str(task))
    notes += [f"models differ in the {kind} of {some(tasks)}" for kind, tasks in kinds.items()]
    versions = sorted(set(rows["lm_eval_version"].dropna()))
    return (
        [*notes, f"the runs are of lm-eval {', '.join(versions)}"] if len(versions) > 1 else notes
    )


def _with_scores(rows: pd.DataFrame, score: str | None, notes: list[str]) -> pd.DataFrame:
    """Return the rows of tasks that have the score, with ``score, score_error, score_of, turned``.

    A score of which lower is better, such as a perplexity, changes its sign and is ``turned``.

    Raises:
        CouplingError: If no task has it.
    """
    scored = []
    for task, group in rows.groupby("task", sort=False):
        metric = _metric(group, score)
        if metric is None:
            notes.append(f"{task} has no {score or 'metric'} and was left out")
            continue
        error = group.get(metric.replace(",", "_stderr,", 1), pd.Series(np.nan, index=group.index))
        lower = _is_lower_better(group, metric, notes)
        name = metric.removesuffix(",none")
        scored.append(
            group.assign(
                score=-group[metric] if lower else group[metric],
                turned=lower,
                score_error=_without_zeros(error, group[metric], group["n_samples"]),
                score_of=f"{task} {'−' if lower else ''}{name}",
                metric=metric,
            )
        )
    if not scored:
        metrics = sorted(
            {name for name in rows.columns if is_score(name) and rows[name].notna().any()}
        )
        raise CouplingError(
            f"got no score {score!r} in these runs, expected one of {', '.join(metrics)}"
        )
    return pd.concat(scored)


def _is_lower_better(group: pd.DataFrame, metric: str, notes: list[str]) -> bool:
    """Return whether a lower score is better, by lm-eval's word or else by the metric's name.

    Raises:
        CouplingError: If runs disagree, as versions of a task may.
    """
    name = metric.split(",")[0]
    stated = [dict(pairs).get(name) for pairs in group["directions"]]
    directions = {direction for direction in stated if direction is not None}
    if len(directions) > 1:
        first, other = (group["file"].iloc[stated.index(direction)] for direction in (True, False))
        raise CouplingError(
            f"got {name}, better when higher in {first} and when lower in {other}; "
            "choose another score"
        )
    if directions:
        return not directions.pop()
    lower = bool(_LOWER_IS_BETTER.search(metric))
    notes.append(
        f"lm-eval does not say whether {name} is better when higher; "
        f"taken as {'lower' if lower else 'higher'}"
    )
    return lower


def _metric(group: pd.DataFrame, score: str | None) -> str | None:
    available = [name for name in group.columns if is_score(name) and group[name].notna().any()]
    if score is None:
        first = [name for name in group["metric"].mode() if name in available]
        return first[0] if first else None
    return next((name for name in available if score in (name, name.split(",")[0])), None)


def _without_zeros(error: pd.Series, score: pd.Series, n: pd.Series) -> pd.Series:
    """Replace lm-eval's errors of 0, of proportions of 0 and 1, by :func:`proportion_error`."""
    proportion = (error == 0) & score.between(0, 1) & (n > 0)
    # Elsewhere any valid numbers do, as they are not used.
    replaced = proportion_error(score.where(proportion, 0.5), n.where(proportion, 1))
    return error.where(~proportion, replaced).where(lambda e: e > 0)


def some(names: Iterable[object], separator: str = ", ") -> str:
    """Join at most five distinct names, with the number of the others."""
    each = list(dict.fromkeys(map(str, names)))
    more = f" and {len(each) - 5} more" if len(each) > 5 else ""
    return separator.join(each[:5]) + more
