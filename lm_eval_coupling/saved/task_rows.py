"""One run's row per task: its scores, its coupling, and what is known of the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.saved.names import FACTS, facts_beside, facts_from_name
from lm_eval_coupling.saved.saved_run import SavedRun

_NO_METRICS = ("alias", "name", "sample_len")  # releases before 0.4 write "acc" for "acc,none"


def rows_of_run(run: SavedRun) -> Iterator[dict[str, Any]]:
    """One row per task and group of a run that has results; columns are those of :func:`~.results.load_runs`."""
    results, coupling, config = run.results, run.coupling, run.results.get("config") or {}
    origin = {
        "lm_eval_version": results.get("lm_eval_version"),
        "chat_template": bool(results.get("chat_template")),
        "run_id": coupling.get("run_id"),
        "interrupted": bool(coupling.get("interrupted")),
        "date": run.date,
        "file": str(run.file),
    }
    facts = {
        "dtype": str(coupling.get("model_dtype") or config.get("model_dtype") or "").removeprefix(
            "torch."
        )
        or None,
        "n_params": _number(coupling.get("n_params") or config.get("model_num_parameters")),
    }
    facts |= {
        name: _number(coupling.get(name))
        for name in ("n_layers", "d_model", "n_heads", "vocab_size")
    }
    facts |= facts_from_name(run.model, run.revision)
    told = facts_beside(run.file) if run.file else {}
    children = results.get("group_subtasks") or {}
    above = {child: group for group, members in children.items() for child in members or ()}
    for task, found in results["results"].items():
        metrics = {
            key if "," in key else f"{key},none": _number(found[key])
            for key in found
            if key not in _NO_METRICS
        }
        metric = next(filter(is_score, metrics), None)
        yield (
            told
            | {
                "model": run.model,
                "revision": run.revision,
                "variant": run.variant,
                "fingerprint": run.fingerprint,
            }
            | {
                "task": task,
                "alias": str(found.get("alias", task)).strip(" -"),
                "prompting": run.prompting(task),
            }
            | {"is_group": bool(run.leaves.get(task)), "group": above.get(task, "")}
            | {"n_fewshot": _shots(run, task), **_samples(run, task, found)}
            | {"output_type": _output_type(run, task)}
            | {"task_version": _number((results.get("versions") or {}).get(task))}
            | origin
            | {
                "metric": metric,
                "directions": tuple(
                    _directions((results.get("higher_is_better") or {}).get(task) or {})
                ),
            }
            | metrics
            | facts
            | {name: told[name] for name in FACTS if name in told}
            | _coupling_columns(coupling, run.leaves.get(task) or [task])
        )


def _output_type(run: SavedRun, task: str) -> str | None:
    """Of a group, the one that all its tasks have."""
    configs = run.results.get("configs") or {}
    types = {
        (configs.get(leaf) or {}).get("output_type") for leaf in run.leaves.get(task) or [task]
    }
    return types.pop() if len(types) == 1 else None


def _shots(run: SavedRun, task: str) -> float:
    """Of a group, those that all its tasks have in common."""
    given = run.results.get("n-shot") or {}
    counts = {
        _number(given.get(name))
        for name in ([task] if task in given else run.leaves.get(task) or [task])
    }
    return counts.pop() if len(counts) == 1 else math.nan


def _directions(told: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """By metric, without its filter, whether higher is better, as lm-eval itself has it; what it does not say is left out.

    Of a metric of several numbers each may have a direction: ``{"diff": {"mean": false, "max": false}}``.

    Yields:
        A metric, and whether higher is better.
    """
    for name, value in told.items():
        inner = dict(_directions(value)) if isinstance(value, Mapping) else {}
        yield from inner.items()
        if isinstance(value, bool):
            yield name, value
        elif len(set(inner.values())) == 1:
            yield name, next(iter(inner.values()))


def is_score(column: str) -> bool:
    """Whether a column holds one of lm-eval's metrics: no standard error, and not coupling."""
    return "," in column and "_stderr," not in column and not column.startswith("coupling,")


def _number(value: Any) -> float:
    """NaN for what is no number, such as lm-eval's standard error "N/A"."""
    return float(value) if isinstance(value, int | float) else math.nan


def _samples(run: SavedRun, task: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Of a group those of its tasks, where lm-eval does not say."""
    counts = run.results.get("n-samples") or {}
    if task not in counts and found.get("sample_len") is None and (leaves := run.leaves.get(task)):
        members = [counts[leaf] for leaf in leaves if isinstance(counts.get(leaf), Mapping)]
        told = {
            name: sum(_number(count.get(name)) for count in members)
            for name in ("effective", "original")
        }
        return {"n_samples": told["effective"] or math.nan, "n_total": told["original"] or math.nan}
    count = counts.get(task)
    count = count if isinstance(count, Mapping) else {"effective": found.get("sample_len")}
    return {"n_samples": _number(count.get("effective")), "n_total": _number(count.get("original"))}


def _coupling_columns(coupling: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    members = [coupling["tasks"][task] for task in tasks if task in coupling.get("tasks", {})]
    if not members:
        return {
            "coupling_rank": math.nan,
            "worst_certificate": math.nan,
            "measured": 0,
            "failed": 0,
        }
    columns: dict[str, Any] = {
        "coupling_rank": coupling["headline_rank"],
        "worst_certificate": _number(coupling.get("worst_certificate")),
        "measured": sum(member["measured"] for member in members),
        "failed": sum(member["failed"] for member in members),
    }
    for name, first in members[0]["measures"].items():
        for rank in [None] if "mean" in first else first:
            parts = [
                m["measures"].get(name, {})
                if rank is None
                else m["measures"].get(name, {}).get(rank)
                for m in members
            ]
            pooled = parts[0] if len(parts) == 1 else pool([part for part in parts if part])
            columns |= zip(
                _columns(name, rank), (pooled["mean"], pooled["stderr"], pooled["n"]), strict=True
            )
    for rank in members[0]["measures"].get("coupling", {}):
        columns[f"chance@{rank}"] = chance = chance_coupling(int(rank))
        columns[f"coupling_excess@{rank}"] = columns[f"coupling@{rank}"] - chance
    return columns


@functools.cache
def _columns(name: str, rank: str | None) -> tuple[str, str, str]:
    at = "" if rank is None else f"@{rank}"
    return f"{name}{at}", f"{name}_stderr{at}", f"{name}_n{at}"


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Mean, standard error and number of the values of several samples, from those of each: as if computed from all."""
    parts = [part for part in parts if part["n"]]
    n = sum(part["n"] for part in parts)
    if n == 0:
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    mean = sum(part["n"] * part["mean"] for part in parts) / n
    squares = sum(part["n"] * (part["mean"] - mean) ** 2 for part in parts)
    squares += sum(
        (part["n"] - 1) * part["n"] * part["stderr"] ** 2 for part in parts if part["n"] > 1
    )
    return {"mean": mean, "stderr": math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan, "n": n}
