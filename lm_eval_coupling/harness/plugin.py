"""What lm-eval is told about this package, one small step per module of lm-eval. Everything else stays as it was.

Each step wraps one public function so that it acts only for ``coupling-hf``; scoring itself is never touched.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError

MODEL = "coupling-hf"
TARGET = "lm_eval_coupling.harness.lm:CouplingLM"

interrupted = threading.Event()  # by Ctrl-C while it measured, in the run that has just ended
logger = logging.getLogger(
    "lm_eval.coupling"
)  # below lm-eval's own, so that its verbosity and handler apply


class DryRun(Exception):
    """Raised instead of scoring, once lm-eval has built all requests."""


def install() -> None:
    """Take effect on the modules of lm-eval that are loaded, and through the hook on those that will be."""
    from lm_eval_coupling import _startup

    _startup.install(forced=True)
    for name in _STEPS:
        if name in sys.modules:
            after_import(sys.modules[name])


def after_import(module: Any) -> None:
    """Apply the step for one module of lm-eval, again if it was reloaded; a change upstream is reported, never raised."""
    try:
        _STEPS[module.__name__](module)
    except Exception as error:
        logger.warning(
            "lm-eval-coupling does not fit this lm-eval (%s: %s)", module.__name__, error
        )


def _wrap(
    owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace a function of a module or class by ``around(it)``, once; what is reloaded has lost it and gets it again.

    Of a decorated function the one inside is replaced, so that names bound to it before (``from lm_eval import evaluate``)
    lead to ours, too.
    """
    original = inspect.getattr_static(owner, name)
    plain = original.__func__ if isinstance(original, classmethod) else original
    if getattr(plain, "_of_coupling", False):
        return
    if (inside := _decorated_by(plain)) is not None:
        inside.cell_contents = functools.wraps(inside.cell_contents)(around(inside.cell_contents))
        plain._of_coupling = True  # type: ignore[union-attr]
        return
    wrapped = functools.wraps(plain)(around(plain))
    wrapped._of_coupling = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if isinstance(original, classmethod) else wrapped)


def _decorated_by(function: Any) -> Any:
    """Where a decorator keeps the function that it was put on; None for a plain function."""
    inside = getattr(function, "__wrapped__", None)
    cells = getattr(function, "__closure__", None) or ()
    return next(
        (cell for cell in cells if inside is not None and cell.cell_contents is inside), None
    )


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

    def with_ours(original: Callable) -> Callable:
        def init(
            self: Any,
            verbosity: Any = None,
            include_path: Any = None,
            include_defaults: Any = True,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            ours = [tasks_folder()] if include_defaults else []
            theirs = (
                include_path
                if isinstance(include_path, (list, tuple))
                else [include_path]
                if include_path
                else []
            )
            original(self, verbosity, [*ours, *theirs], include_defaults, *args, **kwargs)
            self.include_path = include_path

        return init

    _wrap(manager.TaskManager, "__init__", with_ours)


def _refuse_early(config: Any) -> None:
    """A wrong argument on the command line, before tasks are indexed and anything heavy is loaded."""

    def checked(from_cli: Callable) -> Callable:
        def from_cli_checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
            found = from_cli(cls, *args, **kwargs)
            if found.model == MODEL:
                from lm_eval_coupling.runs.options import Options

                Options.take_from(dict(found.model_args or {}))
                _require_output(found.output_path)
            return found

        return from_cli_checked

    _wrap(config.EvaluatorConfig, "from_cli", checked)


def _record_after_scoring(evaluator: Any) -> None:
    def recording(evaluate: Callable) -> Callable:
        signature = inspect.signature(evaluate)

        def evaluate_and_record(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
            record = getattr(
                getattr(lm, "lm", lm), "record_coupling", None
            )  # a CachingLM holds the model in .lm
            try:
                results = evaluate(lm, task_dict, *args, **kwargs)
            except DryRun:
                results = None
            if record is not None:
                try:
                    how = signature.bind(lm, task_dict, *args, **kwargs)
                    how.apply_defaults()
                    record(task_dict, results, how.arguments)
                except Exception:
                    logger.exception("coupling was not recorded; the scores are complete")
                _write_tables(
                    results, None, _now()
                )  # into coupling_out; who saves the results writes them with its date
            return results

        return evaluate_and_record

    def checking(simple_evaluate: Callable) -> Callable:
        def simple_evaluate_checked(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model == MODEL:
                _require_output(getattr(kwargs.get("evaluation_tracker"), "output_path", None))
            return simple_evaluate(model, *args, **kwargs)

        return simple_evaluate_checked

    _wrap(evaluator, "evaluate", recording)
    _wrap(evaluator, "simple_evaluate", checking)


def _write_tables_with_results(tracking: Any) -> None:
    def with_tables(save: Callable) -> Callable:
        def save_results_aggregated(self: Any, results: Any, samples: Any = None) -> None:
            save(self, results, samples)
            _write_tables(
                results, _results_folder(self), getattr(self, "date_id", _now())
            )  # no date where nothing is saved

        return save_results_aggregated

    _wrap(tracking.EvaluationTracker, "save_results_aggregated", with_tables)


def _results_folder(tracker: Any) -> Path | None:
    """Where a tracker writes results; it takes the name of a JSON file for one in its folder."""
    if not tracker.output_path:
        return None
    path, model = (
        Path(tracker.output_path),
        str(tracker.general_config_tracker.model_name_sanitized),
    )
    return path.parent if path.suffix == ".json" else path / model


def _require_output(output_path: Any) -> None:
    if output_path:
        path = Path(output_path)
        require_writable(path.parent if path.suffix == ".json" else path)


def _close_under_the_table(utils: Any) -> None:
    """lm-eval prints one table, and one of groups where there are some: ours come under the last."""

    def with_closing(make_table: Callable) -> Callable:
        def make_table_and_close(
            result_dict: Any, column: Any = "results", *args: Any, **kwargs: Any
        ) -> Any:
            table = make_table(result_dict, column, *args, **kwargs)
            last = "groups" if "groups" in result_dict else "results"
            closing = getattr(_carried(result_dict), "closing", None)
            if closing is None or column != last:
                return table
            try:
                return f"{table}\n{closing(result_dict)}"
            except Exception:
                logger.exception("coupling: no summary under the table")
                return table

        return make_table_and_close

    _wrap(utils, "make_table", with_closing)


def _carried(results: dict[str, Any] | None) -> Any:
    """What results of ours carry, a `CouplingInfo`; results.py is not imported for runs of others."""
    return ((results or {}).get("config") or {}).get("coupling")


def _write_tables(results: dict[str, Any] | None, folder: Path | None, date: str) -> None:
    """Write the tables of a run of ours, whose rows its results carry."""
    info = _carried(results)
    if not hasattr(info, "write_tables"):
        return
    try:
        info.write_tables(folder, date)
    except Exception as error:
        info.unwritten = str(error)
        logger.exception("coupling tables were not written; measurements are kept in the store")


def _now() -> str:
    return datetime.now().isoformat().replace(":", "-")  # the form of upstream's date_id


def _errors_as_sentences(harness: Any) -> None:
    def plainly(execute: Callable) -> Callable:
        def execute_plainly(self: Any, args: Any) -> Any:
            interrupted.clear()
            try:
                found = execute(self, args)
            except CouplingError as error:
                print(f"lm-eval-coupling: {error}", file=sys.stderr)
                raise SystemExit(2) from None
            if interrupted.is_set():  # the results are written; who waits for the command is not to take them for complete
                raise SystemExit(130)
            return found

        return execute_plainly

    _wrap(harness.HarnessCLI, "execute", plainly)


_STEPS: dict[str, Callable[[Any], None]] = {
    "lm_eval.utils": _close_under_the_table,
    "lm_eval.models": _register_model,
    "lm_eval.tasks.manager": _add_tasks,
    "lm_eval.config.evaluate_config": _refuse_early,
    "lm_eval.evaluator": _record_after_scoring,
    "lm_eval.loggers.evaluation_tracker": _write_tables_with_results,
    "lm_eval._cli.harness": _errors_as_sentences,
}
