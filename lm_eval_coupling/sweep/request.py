"""What lm-eval is asked for a unit, as one of its own configuration files, and what of it the results depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep.answers import scores_file
from lm_eval_coupling.sweep.plan import Plan
from lm_eval_coupling.sweep.source import source
from lm_eval_coupling.sweep.units import Task, Unit

NOTE = "coupling_sweep"  # the key under which lm-eval's results carry what was asked

# How it is computed and what is shown meanwhile: results asked for otherwise in these are still the ones asked for.
_NO_MATTER = {
    *(
        "batch_size",
        "max_batch_size",
        "device",
        "cache_requests",
        "verbosity",
        "write_out",
        "show_config",
    ),
    *(
        "check_integrity",
        "confirm_run_unsafe_code",
        "wandb_args",
        "wandb_config_args",
        "trackio_args",
        "hf_hub_log_args",
    ),
}


def asked(plan: Plan, unit: Unit) -> dict[str, Any]:
    """All that the results of a unit depend on, its tasks and the state of its weights apart; plain JSON."""
    return _plain(
        {
            "model": unit.model,
            "revision": unit.revision,
            "arguments": unit.arguments,
            "coupling": {name: value for name, value in plan.coupling.items() if name != "store"},
            "lm_eval": {
                name: value for name, value in plan.lm_eval.items() if name not in _NO_MATTER
            },
        }
    )


def note(plan: Plan, unit: Unit, tasks: Iterable[Task]) -> dict[str, Any]:
    """What the results of a run carry, so that they say themselves what they are results of."""
    return {
        "asked": asked(plan, unit),
        "tasks": {task.name: task.num_fewshot for task in tasks},
        "source": source(unit, plan.run.environment),
    }


def configuration(
    plan: Plan, unit: Unit, tasks: Iterable[Task], batch_size: Any = None
) -> dict[str, Any]:
    """The content of a file for ``lm_eval run --config FILE``.

    Args:
        plan: the plan.
        unit: the model and revision.
        tasks: those of the plan that are still to be done.
        batch_size: instead of the plan's.

    Returns:
        Plain values that YAML can hold.
    """
    folder, tasks = plan.folder(unit).absolute(), list(tasks)
    coupling = {f"coupling_{name}": value for name, value in plan.coupling.items()}
    store = {"coupling_store": str(store_file(folder))} if plan.measures else {}
    made = dict(plan.lm_eval) | {
        "model": "coupling-hf",
        "model_args": {"pretrained": unit.model, "revision": unit.revision}
        | store
        | coupling
        | dict(unit.arguments),
        "tasks": [task.name for task in tasks],
        "output_path": str(folder),
        "metadata": {NOTE: note(plan, unit, tasks)},
    }
    if any(task.num_fewshot is not None for task in tasks):
        made["include_path"] = [
            *_several(plan.lm_eval.get("include_path")),
            str(overrides_folder(plan)),
        ]
    if plan.run.keep_scores:
        made["use_cache"] = str(scores_file(folder))
    if batch_size is not None:
        made["batch_size"] = batch_size
    return _plain(made)


def store_file(folder: Path) -> Path:
    """Where the measurements of a unit are kept: one writer, so that no file system's locks are needed.

    Stores of another schema are another file, or a unit that was begun before an update could not go on after it.

    Returns:
        The file, which may not be there yet.
    """
    from lm_eval_coupling.runs.store import SCHEMA_VERSION

    return folder / f"measurements-{SCHEMA_VERSION}.sqlite"


def overrides_folder(plan: Plan) -> Path:
    """Where the tasks lie whose number of examples the plan sets."""
    return plan.output.absolute() / "tasks"


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _plain(value: Any) -> Any:
    """As it comes back from JSON, in which results are kept."""
    return json.loads(json.dumps(value, default=str))
