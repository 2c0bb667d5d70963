"""Functions in place of lm-eval's own, which they call; they act only for ``coupling-hf``.

Scoring is never touched.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval_coupling.console import require_process_folders
from lm_eval_coupling.errors import CouplingError, message_of
from lm_eval_coupling.harness import sharing
from lm_eval_coupling.harness.command_line import (
    MODEL,
    Command,
    current_command,
    execute_plainly,
    join_running_command,
    parse_args_with_hint,
)
from lm_eval_coupling.harness.lm_eval_internals import wrap
from lm_eval_coupling.harness.sharing import carried

TARGET = "lm_eval_coupling.harness.lm:CouplingLM"
# lm-eval's command passes this where no device is given; HFLM then takes the CPU without a GPU.
DEFAULT_DEVICE = "cuda:0"

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")


class DryRun(Exception):
    """Raised instead of scoring, once lm-eval has built all requests."""


def after_import(module: Any) -> None:
    """Replace functions of one module of lm-eval, again after a reload.

    A module that has changed upstream gives a warning, never an error.
    """
    try:
        if module.__name__ == "lm_eval.models":
            _register_model()
        for path, instead in STEPS[module.__name__].items():
            wrap(module, path, instead)
    except Exception as error:
        logger.warning(
            "lm-eval-coupling does not fit this lm-eval (%s: %s)", module.__name__, error
        )


def tasks_folder() -> Path:
    """Return the folder of our task definitions, in an installed package or in a checkout."""
    installed = Path(__file__).parents[1] / "_tasks"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "tasks"


def _register_model() -> None:
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)


def _make_task_manager(
    init: Callable,
    manager: Any,
    verbosity: Any = None,
    include_path: Any = None,
    include_defaults: Any = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Put our tasks right after the defaults.

    Later folders override earlier ones, so a user's own tasks win.
    """
    ours = [tasks_folder()] if include_defaults else []
    theirs = include_path or []
    theirs = theirs if isinstance(theirs, list | tuple) else [theirs]
    init(manager, verbosity, [*ours, *theirs], include_defaults, *args, **kwargs)
    manager.include_path = include_path
    current_command().tasks = manager


def _read_command_line(from_cli: Callable, *args: Any, **kwargs: Any) -> Any:
    """Check our arguments before anything heavy is loaded, and return lm-eval's settings."""
    settings = from_cli(*args, **kwargs)
    if settings.model == MODEL:
        from lm_eval_coupling.runs.options import Options

        current_command().is_ours = True
        require_process_folders()
        Options.take_from(dict(settings.model_args or {}))  # a copy: the model class takes them
        _require_output(settings.output_path)
        require_device(settings.device)
    elif str(settings.model).startswith("coupling"):
        raise CouplingError(
            f"got --model {settings.model}, which lm-eval does not know; did you mean {MODEL}?"
        )
    return settings


def require_device(device: Any) -> None:
    """Refuse a device that this machine does not have; torch is imported only if one is named."""
    name = str(device)
    if device in (None, "cpu", DEFAULT_DEVICE) or re.match(r"(npu|hpu|xpu)\b", name):
        return
    from lm_eval_coupling.numerics.devices import device_named

    device_named(name)


def _evaluate(
    evaluate: Callable, /, lm: Any, task_dict: Any, *args: Any, **kwargs: Any
) -> dict[str, Any] | None:
    """Record coupling after the scoring, if the model is ours."""
    model = getattr(lm, "lm", lm)  # a CachingLM holds the model in `.lm`
    record = getattr(model, "record_coupling", None)
    if record is None:
        return evaluate(lm, task_dict, *args, **kwargs)
    call = inspect.signature(evaluate).bind(lm, task_dict, *args, **kwargs)
    call.apply_defaults()
    if (announce := getattr(model, "announce_coupling", None)) is not None:
        announce(task_dict, call.arguments)
    try:
        results = evaluate(lm, task_dict, *args, **kwargs)
    except DryRun:
        results = None
    try:
        record(task_dict, results, call.arguments)
    except Exception as error:
        logger.exception("coupling was not recorded; the scores are complete")
        current_command().problems.append(f"coupling was not recorded ({message_of(error)})")
    # Into coupling_out. A tracker that saves the results writes them again, with its date.
    _write_tables(results, None, _now())
    if (info := carried(results)) is not None:
        command = current_command()
        command.interrupted |= bool(info.get("interrupted"))
        command.problems += [info.unstored] if info.unstored else []
        command.unprinted = results
    return results


def _simple_evaluate(simple_evaluate: Callable, /, model: Any, *args: Any, **kwargs: Any) -> Any:
    if model == MODEL:
        _require_output(getattr(kwargs.get("evaluation_tracker"), "output_path", None))
        require_device(kwargs.get("device"))
    return simple_evaluate(model, *args, **kwargs)


def _save_results(save: Callable, tracker: Any, results: Any, samples: Any = None) -> None:
    """Write our tables beside lm-eval's results."""
    save(tracker, results, samples)
    # The tracker has no date if it saves nothing.
    date = getattr(tracker, "date_id", _now())
    folder = _results_folder(tracker)
    info = tracker.coupling_info = carried(results)
    _write_tables(results, folder, date)
    if folder is not None and info is not None:
        sharing.push_tables(tracker, info, folder, samples_follow=samples is not None)
        stem = Path(tracker.output_path).stem if folder != _model_folder(tracker) else "results"
        _require_complete(folder / f"{stem}_{date}.json", json.loads)


def _save_samples(save: Callable, tracker: Any, task_name: str, samples: Any) -> None:
    save(tracker, task_name, samples)
    folder = _results_folder(tracker)
    if folder is not None and getattr(tracker, "coupling_info", None) is not None:
        file = folder / f"samples_{task_name}_{tracker.date_id}.jsonl"
        _require_complete(file, lambda text: _require_lines(text, len(samples)))


def _require_complete(file: Path, parse: Callable[[str], Any]) -> None:
    """Note an incomplete file of lm-eval, which on a full disk logs a warning and goes on."""
    try:
        parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"got {file}, which lm-eval could not write completely ({message_of(error)})"
        logger.error("coupling: %s", problem)
        current_command().problems.append(problem)


def _require_lines(text: str, expected: int) -> None:
    if (lines := text.count("\n")) < expected:
        raise ValueError(f"{lines} of {expected} lines")


def _results_folder(tracker: Any) -> Path | None:
    """Return the folder into which a tracker writes; an output path may be a JSON file's."""
    if not tracker.output_path:
        return None
    path = Path(tracker.output_path)
    return path.parent if path.suffix == ".json" else _model_folder(tracker)


def _model_folder(tracker: Any) -> Path:
    return Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)


def _require_output(output_path: Any) -> None:
    if output_path:
        from lm_eval_coupling.saved.atomic import require_writable

        path = Path(output_path)
        require_writable(path.parent if path.suffix == ".json" else path)


def _make_table(
    make_table: Callable, /, result_dict: Any, column: Any = "results", *args: Any, **kwargs: Any
) -> Any:
    """Put our lines under the last of lm-eval's tables: that of groups, if there are any."""
    table = make_table(result_dict, column, *args, **kwargs)
    last = "groups" if "groups" in result_dict else "results"
    info = carried(result_dict)
    if info is None or column != last:
        return table
    current_command().unprinted = None
    summary = _summary(info, result_dict)
    return f"{table}\n{summary}" if summary else table


def _summary(info: Any, results: dict[str, Any]) -> str:
    try:
        from lm_eval_coupling.runs.closing import closing_lines

        return closing_lines(info, results)
    except Exception:
        logger.exception("coupling: no summary under the table")
        return ""


def serve_running_command() -> None:
    """Serve a command of lm-eval that began without the start-up hook, as far as still possible.

    It holds the unchanged function that makes its tables. Our lines are therefore printed when
    Python ends, which is right after the tables.
    """

    def print_summary(command: Command) -> None:
        if (results := command.unprinted) is not None:
            print(_summary(carried(results), results), flush=True)

    if (command := join_running_command()) is not None:
        atexit.register(print_summary, command)


def _write_tables(results: dict[str, Any] | None, folder: Path | None, date: str) -> None:
    """Write the tables of a run whose rows its results carry."""
    if (info := carried(results)) is None:
        return
    try:
        info.write_tables(folder, date)
    except Exception as error:
        info.unwritten = str(error)
        problem = f"coupling tables were not written ({message_of(error)})"
        logger.error("%s; measurements are kept in the store", problem)
        logger.debug("coupling: the error was", exc_info=True)
        current_command().problems.append(problem)


def _now() -> str:
    return datetime.now().isoformat().replace(":", "-")  # the form of lm-eval's own dates


# By module, the functions that take the place of its own; `lm_eval.models` gets our model class.
STEPS: dict[str, dict[str, Callable]] = {
    "lm_eval.utils": {"make_table": _make_table},
    "lm_eval.models": {},
    "lm_eval.tasks.manager": {"TaskManager.__init__": _make_task_manager},
    "lm_eval.config.evaluate_config": {"EvaluatorConfig.from_cli": _read_command_line},
    "lm_eval.evaluator": {"evaluate": _evaluate, "simple_evaluate": _simple_evaluate},
    "lm_eval.loggers.evaluation_tracker": {
        "EvaluationTracker.save_results_aggregated": _save_results,
        "EvaluationTracker.save_results_samples": _save_samples,
        "EvaluationTracker.recreate_metadata_card": sharing.make_card_with_tables,
    },
    "lm_eval.loggers.wandb_logger": {
        "WandbLogger.log_eval_result": sharing.log_result_to_wandb,
        "WandbLogger.log_eval_samples": sharing.log_samples_to_wandb,
    },
    "lm_eval.loggers.trackio_logger": {
        "TrackioLogger.log_eval_result": sharing.log_result_to_trackio,
        "TrackioLogger.log_eval_samples": sharing.log_samples_to_trackio,
    },
    "lm_eval._cli.harness": {
        "HarnessCLI.execute": execute_plainly,
        "HarnessCLI.parse_args": parse_args_with_hint,
    },
}
