"""Configuration of lm-eval for a unit, and the part of it that its results depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep.answers import scores_file
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.source import source
from lm_eval_coupling.sweep.units import Task, Unit

NOTE = "coupling_sweep"  # The key under which lm-eval's results carry what was asked for.

# Options that change how results are computed or shown, but not what they are.
_WITHOUT_EFFECT = {
    *("batch_size", "max_batch_size", "device", "cache_requests", "verbosity", "write_out"),
    *("show_config", "check_integrity", "confirm_run_unsafe_code", "wandb_args"),
    *("wandb_config_args", "trackio_args", "hf_hub_log_args"),
}


def asked(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Return all that a unit's results depend on, tasks and weights apart, as plain JSON."""
    lm_eval = {name: v for name, v in plan.lm_eval.items() if name not in _WITHOUT_EFFECT}
    content = {
        "model": unit.model,
        "revision": unit.revision,
        "arguments": unit.arguments,
        "coupling": {name: value for name, value in plan.coupling.items() if name != "store"},
        "lm_eval": lm_eval,
    }
    # Results are kept in JSON, in which keys are texts: compared is what comes back from it.
    return json.loads(json.dumps(content, default=str))


def note(plan: Plan, unit: Unit, tasks: Iterable[Task]) -> dict[str, Any]:
    """Return the metadata by which results of a run say themselves what they are results of."""
    return {
        "asked": asked(plan, unit),
        "tasks": {task.name: task.asked for task in tasks},
        "source": source(unit, plan.run.environment),
    }


def configuration(
    plan: Plan, unit: Unit, tasks: Iterable[Task], batch_size: Any = None
) -> dict[str, Any]:
    """Return the content of a file for the command of a run, without any secret.

    The command is ``lm_eval run --config FILE``. For samples it is
    ``lm-eval-coupling measure --config FILE``. ``tasks`` are those still to be done, and
    ``batch_size`` replaces the plan's.
    """
    folder, tasks = plan.folder(unit).absolute(), list(tasks)
    metadata = {NOTE: note(plan, unit, tasks)}
    if plan.samples is not None:
        return _measuring(plan, unit, tasks, folder) | {"metadata": metadata}
    coupling = {f"coupling_{name}": value for name, value in plan.coupling.items()}
    store = {"coupling_store": str(store_file(folder))} if plan.measures else {}
    model = {"pretrained": unit.model, "revision": unit.revision}
    content = dict(plan.lm_eval) | {
        "model": "coupling-hf",
        "model_args": model | store | coupling | dict(unit.arguments),
        "tasks": [task.name for task in tasks],
        "output_path": str(folder),
        "metadata": metadata,
    }
    if any(task.num_fewshot is not None for task in tasks):
        content["include_path"] = [*include_paths(plan), str(overrides_folder(plan))]
    if plan.run.keep_scores:
        content["use_cache"] = str(scores_file(folder))
    if batch_size is not None:
        content["batch_size"] = batch_size
    return content


def _measuring(plan: Plan, unit: Unit, tasks: Iterable[Task], folder: Path) -> dict[str, Any]:
    """Return the arguments of ``measure_samples`` for the evaluations that have these tasks."""
    wanted = set(tasks)
    evaluations = [each for each in unit.evaluations if not wanted.isdisjoint(each.tasks)]
    return {
        "model": unit.model,
        "results": [str(evaluation.file.absolute()) for evaluation in evaluations],
        "out": str(folder),
        "model_args": {"revision": unit.revision, **unit.arguments},
        "coupling": {"store": str(store_file(folder))} | dict(plan.coupling),
        "device": plan.lm_eval.get("device"),
    }


def store_file(folder: Path) -> Path:
    """Return the store of a unit, which has one writer, so that it needs no file system's locks.

    A store of another schema is another file, so that an update does not stop a unit half-way.
    """
    from lm_eval_coupling.runs.store import SCHEMA_VERSION

    return folder / f"measurements-{SCHEMA_VERSION}.sqlite"


def overrides_folder(plan: Plan) -> Path:
    """Return the folder of the tasks whose number of examples the plan sets."""
    return plan.output.absolute() / "tasks"


def include_paths(plan: Plan) -> list[str]:
    """Return the folders of tasks that the plan names."""
    value = plan.lm_eval.get("include_path") or []
    return [str(item) for item in (value if isinstance(value, list) else [value])]
