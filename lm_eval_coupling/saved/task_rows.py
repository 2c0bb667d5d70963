"""The row of each task of a run: its scores, its coupling, and facts about the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.measures.formulas.means import mean_of_parts
from lm_eval_coupling.measures.registry import sample_readings
from lm_eval_coupling.saved.answer_settings import mapping
from lm_eval_coupling.saved.fact_types import FACTS
from lm_eval_coupling.saved.facts import facts_beside
from lm_eval_coupling.saved.names import facts_from_name
from lm_eval_coupling.saved.results_file import number
from lm_eval_coupling.saved.saved_run import SavedRun

_NO_METRICS = ("alias", "name", "sample_len")  # releases before 0.4 write "acc" for "acc,none"


def rows_of_run(run: SavedRun) -> Iterator[dict[str, Any]]:
    """Yield one row per task and group of a run that has results.

    The columns are those of :func:`~.scores_table.load_runs`.
    """
    results, coupling, config = run.results, run.coupling, run.results.get("config") or {}
    origin = {
        "lm_eval_version": results.get("lm_eval_version"),
        "chat_template": bool(results.get("chat_template")),
        "run_id": coupling.get("run_id"),
        "interrupted": bool(coupling.get("interrupted")),
        "date": run.date,
        "time": run.time,
        "file": str(run.file),
    }
    facts: dict[str, Any] = {
        "dtype": run.dtype or None,
        "n_params": number(coupling.get("n_params") or config.get("model_num_parameters")),
    }
    sizes = ("n_layers", "d_model", "n_heads", "vocab_size")
    facts |= {name: number(coupling.get(name)) for name in sizes}
    facts |= facts_from_name(run.model, run.revision)
    beside = facts_beside(run.file) if run.file else {}
    facts |= {name: beside[name] for name in (*FACTS, "step", "lineage") if name in beside}
    for task, values in results["results"].items():
        metrics = {
            key if "," in key else f"{key},none": number(values[key])
            for key in values
            if key not in _NO_METRICS
        }
        what = run.what_was_run(task)
        directions = (results.get("higher_is_better") or {}).get(task) or {}
        yield beside | {
            "model": what.model,
            "revision": what.revision,
            "variant": what.variant,
            "fingerprint": what.fingerprint,
            "task": task,
            "alias": str(values.get("alias") or task).strip(" -"),
            "prompting": what.prompting,
            "is_group": bool(run.leaves.get(task)),
            "group": next(iter(run.groups.get(task, ())), ""),
            "groups": _groups_above(run, task),
            "n_fewshot": _shots(run, task),
            **_samples(run, task, values),
            "output_type": _output_type(run, task),
            "task_version": _version((results.get("versions") or {}).get(task)),
            **origin,
            "metric": next(filter(is_score, metrics), None),
            "directions": tuple(_directions(directions)),
            **metrics,
            **facts,
            **_coupling_columns(coupling, run.leaves.get(task) or [task]),
        }


def _groups_above(run: SavedRun, task: str) -> tuple[str, ...]:
    """Return all groups that a task is in, directly or through other groups."""
    above: dict[str, None] = {}
    waiting = list(run.groups.get(task, ()))
    while waiting:
        group = waiting.pop(0)
        if group not in above and group != task:
            above[group] = None
            waiting += run.groups.get(group, ())
    return tuple(above)


def _version(version: Any) -> float | str:
    """Return a number for a version that is one, the text for one such as "1.0.2", else NaN."""
    return version if isinstance(version, str) and version.strip() else number(version)


def _output_type(run: SavedRun, task: str) -> str | None:
    """Return a task's output type, or the one that all tasks of a group have."""
    configs = run.results.get("configs") or {}
    types = {
        (configs.get(leaf) or {}).get("output_type") for leaf in run.leaves.get(task) or [task]
    }
    return types.pop() if len(types) == 1 else None


def _shots(run: SavedRun, task: str) -> float:
    """Return a task's number of examples, or the one that all tasks of a group have."""
    given = run.results.get("n-shot") or {}
    tasks = [task] if task in given else run.leaves.get(task) or [task]
    counts = {number(given.get(name)) for name in tasks}
    return counts.pop() if len(counts) == 1 else math.nan


def _directions(higher_is_better: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield metrics, without their filter, and whether higher is better, as far as lm-eval says.

    A metric of several numbers may have a direction for each:
    ``{"diff": {"mean": false, "max": false}}``.
    """
    for name, value in higher_is_better.items():
        inner = dict(_directions(value)) if isinstance(value, Mapping) else {}
        yield from inner.items()
        if isinstance(value, bool):
            yield name, value
        elif len(set(inner.values())) == 1:
            yield name, next(iter(inner.values()))


def is_score(column: str) -> bool:
    """Return whether a column is a metric of lm-eval: no standard error, and not coupling."""
    return "," in column and "_stderr," not in column and not column.startswith("coupling,")


def _samples(run: SavedRun, task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return how many documents of a task were evaluated; for a group the sum over its tasks."""
    counts = run.results.get("n-samples") or {}
    leaves = run.leaves.get(task)
    if task not in counts and values.get("sample_len") is None and leaves:
        members = [mapping(counts.get(leaf)) for leaf in leaves]
        # NaN if the count of one task is unknown: the others' sum is another number.
        effective, original = (
            sum(number(count.get(name)) for count in members) for name in ("effective", "original")
        )
        return {"n_samples": effective, "n_total": original}
    count = mapping(counts.get(task)) or {"effective": values.get("sample_len")}
    return {"n_samples": number(count.get("effective")), "n_total": number(count.get("original"))}


def _coupling_columns(coupling: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the values of all measures, pooled over the tasks; NaN where one is undefined."""
    summaries = coupling.get("tasks") or {}
    members = [summaries[task] for task in tasks if task in summaries]
    if not members:
        unknown = dict.fromkeys(("coupling_rank", "worst_certificate"), math.nan)
        return unknown | {"measured": 0, "failed": 0, "measured_tasks": ()}
    columns: dict[str, Any] = {
        "coupling_rank": number(coupling.get("headline_rank")),
        "worst_certificate": number(coupling.get("worst_certificate")),
        "measured": sum(member.get("measured") or 0 for member in members),
        "failed": sum(member.get("failed") or 0 for member in members),
        "measured_tasks": tuple(
            task for task in tasks if task in summaries and summaries[task].get("measured")
        ),
    }
    measures = [member.get("measures") or {} for member in members]
    names = dict.fromkeys(name for measured in measures for name in measured)
    for name in names:
        first = next(measured[name] for measured in measures if name in measured)
        for rank in [None] if "mean" in first else first:
            of_tasks = [measured.get(name, {}) for measured in measures]
            parts = of_tasks if rank is None else [of_task.get(rank) for of_task in of_tasks]
            combine = mean_over_tasks if name in sample_readings() else pool
            pooled = combine([part for part in parts if part])
            columns |= zip(
                _columns(name, rank), (pooled["mean"], pooled["stderr"], pooled["n"]), strict=True
            )
    for column in [column for column in columns if column.startswith("coupling@")]:
        rank = column.removeprefix("coupling@")
        columns[f"chance@{rank}"] = chance = chance_coupling(int(rank))
        columns[f"coupling_excess@{rank}"] = columns[column] - chance
    return columns


@functools.cache
def _columns(name: str, rank: str | None) -> tuple[str, str, str]:
    at = "" if rank is None else f"@{rank}"
    return f"{name}{at}", f"{name}_stderr{at}", f"{name}_n{at}"


def mean_over_tasks(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Average readings of the samples of several tasks, which do not pool.

    Returns:
        ``mean, stderr`` of the mean over tasks, NaN if one is undefined, and ``n`` of all.
    """
    means, errors = ([number(part[name]) for part in parts] for name in ("mean", "stderr"))
    n = sum(part["n"] or 0 for part in parts)
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(parts)
    return {"mean": mean_of_parts(means), "stderr": stderr, "n": n}


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Pool samples, given by their mean, standard error and n, as if computed from all values.

    Returns:
        ``mean, stderr, n``. NaN for a mean of nothing, and for the error of fewer than two values
        or of samples one of whose errors is unknown.
    """
    numbers = [tuple(number(part[name]) for name in ("mean", "stderr", "n")) for part in parts]
    samples = [
        (mean, error, int(size))
        for mean, error, size in numbers
        if math.isfinite(mean) and math.isfinite(size) and size >= 1
    ]
    n = sum(size for _, _, size in samples)
    if n == 0:
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    if len(samples) == 1:
        return dict(zip(("mean", "stderr", "n"), samples[0], strict=True))
    mean = sum(size * value for value, _, size in samples) / n
    squares = sum(size * (value - mean) ** 2 for value, _, size in samples)
    squares += sum((size - 1) * size * error**2 for _, error, size in samples if size > 1)
    return {"mean": mean, "stderr": math.sqrt(squares / (n - 1) / n), "n": n}
