"""What lm-eval is told about this package, one small step per module of lm-eval. Everything else stays as it was.

Each step wraps one public function so that it acts only for ``coupling-hf``; scoring itself is never touched.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError

MODEL = "coupling-hf"
TARGET = "lm_eval_coupling.harness.lm:CouplingLM"

logger = logging.getLogger("lm_eval.coupling")  # below lm-eval's own, so that its verbosity and handler apply


def install() -> None:
    """Take effect on the modules of lm-eval that are loaded, and through the hook on those that will be."""
    from lm_eval_coupling import _startup

    _startup.install(asked=True)
    for name in _STEPS:
        if name in sys.modules:
            after_import(sys.modules[name])


def after_import(module: Any) -> None:
    """Apply the step for one module of lm-eval, once; a change upstream is reported, never raised."""
    if getattr(module, "_coupling_applied", False):
        return
    try:
        _STEPS[module.__name__](module)
        module._coupling_applied = True
    except Exception as error:
        logger.warning("lm-eval-coupling does not fit this lm-eval (%s: %s)", module.__name__, error)


def require_writable(folder: Path) -> None:
    """Create ``folder``, or say that it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise CouplingError(
            f"got output folder {folder}, which cannot be written ({error.strerror}); choose another"
        ) from None


def tasks_folder() -> Path:
    """Our task definitions: inside an installed package, beside it in a checkout."""
    installed = Path(__file__).parents[1] / "_tasks"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "tasks"


def _register_model(models: Any) -> None:
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)


def _add_tasks(manager: Any) -> None:
    """Ours come right after the defaults: later folders override earlier ones, so a user's own tasks win."""
    original = manager.TaskManager.__init__

    @functools.wraps(original)
    def init(self, verbosity=None, include_path=None, include_defaults=True, *args, **kwargs):
        ours = [tasks_folder()] if include_defaults else []
        theirs = include_path if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
        original(self, verbosity, [*ours, *theirs], include_defaults, *args, **kwargs)
        self.include_path = include_path

    manager.TaskManager.__init__ = init


def _record_after_scoring(evaluator: Any) -> None:
    evaluate, simple_evaluate = evaluator.evaluate, evaluator.simple_evaluate

    @functools.wraps(evaluate)
    def evaluate_and_record(lm, task_dict, *args, **kwargs):
        results = evaluate(lm, task_dict, *args, **kwargs)
        record = getattr(getattr(lm, "lm", lm), "record_coupling", None)  # a CachingLM holds the model in .lm
        if record is not None:
            try:
                record(task_dict, results)
            except Exception:
                logger.exception("coupling was not recorded; the scores are complete")
            _write_tables(results, None, _now())  # into coupling_out; whoever saves the results writes them with its date
        return results

    @functools.wraps(simple_evaluate)
    def simple_evaluate_checked(model, *args, **kwargs):
        tracker = kwargs.get("evaluation_tracker")
        if model == MODEL and tracker is not None and tracker.output_path:
            path = Path(tracker.output_path)
            require_writable(path.parent if path.suffix == ".json" else path)
        return simple_evaluate(model, *args, **kwargs)

    evaluator.evaluate, evaluator.simple_evaluate = evaluate_and_record, simple_evaluate_checked


def _write_tables_with_results(tracking: Any) -> None:
    tracker_class = tracking.EvaluationTracker
    save = tracker_class.save_results_aggregated

    @functools.wraps(save)
    def save_results_aggregated(self, results, samples=None):
        save(self, results, samples)
        date = getattr(self, "date_id", _now())  # absent where nothing was saved
        if self.output_path:
            path, model = Path(self.output_path), str(self.general_config_tracker.model_name_sanitized)
            _write_tables(results, path.parent if path.suffix == ".json" else path / model, date)
        else:
            _write_tables(results, None, date)

    tracker_class.save_results_aggregated = save_results_aggregated


def _write_tables(results: dict[str, Any] | None, folder: Path | None, date: str) -> None:
    """Write the tables of a run of ours, which its results carry (see results.py, not imported for runs of others)."""
    write = getattr(((results or {}).get("config") or {}).get("coupling"), "write_tables", None)
    try:
        if write is not None:
            write(folder, date)
    except Exception:
        logger.exception("coupling tables were not written; measurements are kept in the store")


def _now() -> str:
    return datetime.now().isoformat().replace(":", "-")  # the form of upstream's date_id


def _errors_as_sentences(harness: Any) -> None:
    execute = harness.HarnessCLI.execute

    @functools.wraps(execute)
    def execute_plainly(self, args):
        try:
            return execute(self, args)
        except CouplingError as error:
            print(f"lm-eval-coupling: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    harness.HarnessCLI.execute = execute_plainly


_STEPS: dict[str, Callable[[Any], None]] = {
    "lm_eval.models": _register_model,
    "lm_eval.tasks.manager": _add_tasks,
    "lm_eval.evaluator": _record_after_scoring,
    "lm_eval.loggers.evaluation_tracker": _write_tables_with_results,
    "lm_eval._cli.harness": _errors_as_sentences,
}
