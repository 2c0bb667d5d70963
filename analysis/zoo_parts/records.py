"""Results small enough to be committed: a group as one task, its coupling pooled, without what no reader asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.saved.task_rows import pool

KEPT = ("lm_eval_version", "transformers_version", "model_name", "date")
PER_TASK = ("versions", "n-shot", "higher_is_better")


def write_small(results: Path, to: Path) -> int:
    """Copy every results file below ``results`` into a folder of its model in ``to``, made small; how many there are."""
    files = sorted(results.glob("*/results_*.json"))
    for file in files:
        small = to / file.parent.name / file.name
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_text(json.dumps(made_small(json.loads(file.read_text())), indent=1) + "\n")
    return len(files)


def made_small(run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a results file with every group as one task; ``load_runs`` gives the same numbers of it."""
    groups = {name: members for name, members in run["group_subtasks"].items() if members}
    grouped = {member for members in groups.values() for member in members}
    tasks = {name: groups.get(name, [name]) for name in run["results"] if name not in grouped}
    coupling = run["config"]["coupling"]
    summaries = {
        name: pooled(coupling["tasks"][leaf] for leaf in of if leaf in coupling["tasks"])
        for name, of in tasks.items()
    }
    told = coupling.get("prompts", {})
    prompts = {
        name: _common([told[leaf] for leaf in of if leaf in told]) for name, of in tasks.items()
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


def pooled(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One summary of the coupling of several tasks, as if they were one."""
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
    """What is the same for all tasks of a group."""
    return {
        key: value
        for key, value in (prompts[0] if prompts else {}).items()
        if all(other.get(key) == value for other in prompts)
    }
