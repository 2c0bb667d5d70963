"""Results small enough to be committed: groups as one task with their coupling pooled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.saved.task_rows import pool

KEPT = ("lm_eval_version", "transformers_version", "model_name", "date")
PER_TASK = ("versions", "n-shot", "higher_is_better")


def write_small(results: Path, to: Path) -> int:
    """Copy the results files below ``results`` into ``to``, made small; return their number."""
    files = sorted(results.glob("*/results_*.json"))
    for file in files:
        small = to / file.parent.name / file.name
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_text(json.dumps(shrink_results(json.loads(file.read_text())), indent=1) + "\n")
    return len(files)


def shrink_results(run: Mapping[str, Any]) -> dict[str, Any]:
    """Make every group of a results file one task; ``load_runs`` reads the same numbers from it."""
    groups = {name: members for name, members in run["group_subtasks"].items() if members}
    grouped = {member for members in groups.values() for member in members}
    tasks = {name: groups.get(name, [name]) for name in run["results"] if name not in grouped}
    coupling = run["config"]["coupling"]
    summaries = {
        name: pool_summaries(coupling["tasks"][leaf] for leaf in of if leaf in coupling["tasks"])
        for name, of in tasks.items()
    }
    prompts_of_leaves = coupling.get("prompts", {})
    prompts = {
        name: _common([prompts_of_leaves[leaf] for leaf in of if leaf in prompts_of_leaves])
        for name, of in tasks.items()
    }
    arguments = {key: run["config"]["model_args"][key] for key in ("pretrained", "dtype")}
    about = {key: coupling[key] for key in coupling if key not in ("tasks", "prompts")}
    return {
        "results": {name: run["results"][name] for name in tasks},
        **{
            key: {name: run[key][name] for name in tasks if name in run[key]}
            for key in PER_TASK
            if key in run
        },
        "n-samples": {
            name: _counted(run["n-samples"][leaf] for leaf in of) for name, of in tasks.items()
        },
        "config": {
            "model": run["config"]["model"],
            "model_args": arguments,
            "coupling": about | {"tasks": summaries, "prompts": prompts},
        },
        **{key: run.get(key) for key in KEPT},
    }


def pool_summaries(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Pool the coupling summaries of several tasks as if they were one task."""
    parts = list(summaries)
    measures = {
        name: pool([part["measures"][name] for part in parts])
        if "mean" in first
        else {rank: pool([part["measures"][name][rank] for part in parts]) for rank in first}
        for name, first in (parts[0]["measures"] if parts else {}).items()
    }
    return {key: sum(part[key] for part in parts) for key in ("measured", "failed")} | {
        "measures": measures
    }


def _counted(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    counts = list(counts)
    return {key: sum(count[key] for count in counts) for key in ("original", "effective")}


def _common(prompts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that all tasks of a group share."""
    return {
        key: value
        for key, value in (prompts[0] if prompts else {}).items()
        if all(other.get(key) == value for other in prompts)
    }
