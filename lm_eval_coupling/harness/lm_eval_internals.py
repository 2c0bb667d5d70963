"""Names inside lm-eval that it does not promise to keep, and what is lost without each.

No other module names them. A test resolves each against the installed release, and says which one
moved.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("lm_eval.coupling")

# By module, the functions that are wrapped. One that is gone is a warning with these words.
WRAPPED = {
    "lm_eval.utils": {"make_table": "no summary is printed under the tables"},
    "lm_eval.tasks.manager": {"TaskManager.__init__": "bundled tasks need --include_path"},
    "lm_eval.config.evaluate_config": {
        "EvaluatorConfig.from_cli": "a wrong argument is refused only once tasks are loaded"
    },
    "lm_eval.evaluator": {
        "evaluate": "coupling is not measured",
        "simple_evaluate": "a folder that cannot be written is noticed only after scoring",
    },
    "lm_eval.loggers.evaluation_tracker": {
        "EvaluationTracker.save_results_aggregated": "tables are written to coupling_out only",
        "EvaluationTracker.save_results_samples": "samples that are cut short go unnoticed",
        "EvaluationTracker.recreate_metadata_card": "dataset cards do not name coupling tables",
    },
    "lm_eval.loggers.wandb_logger": {
        "WandbLogger.log_eval_result": "W&B gets no curves over layers",
        "WandbLogger.log_eval_samples": "W&B's table of samples has no coupling",
    },
    "lm_eval.loggers.trackio_logger": {
        "TrackioLogger.log_eval_result": "trackio gets no curves over layers",
        "TrackioLogger.log_eval_samples": "trackio's samples have no coupling",
    },
    "lm_eval._cli.harness": {
        "HarnessCLI.execute": "a mistake ends in a traceback, an incomplete run with exit code 0",
        "HarnessCLI.parse_args": "coupling_ranks=10,30 is refused without a hint",
    },
}
# By module, other private names, each used by one function below.
USED = {
    "lm_eval._cli.run": {
        "Run": "without the start-up hook, no summary is printed and mistakes end in tracebacks"
    },
    "lm_eval.evaluator_utils": {
        "_handle_back_comp": "nested dictionaries of tasks, as of older callers, are not measured"
    },
    "lm_eval.models.huggingface": {
        "HFLM._encode_pair": "documents with choices are not measured; their records say why",
        "HFLM._get_config": "a wrong model or rank is refused only once the weights are loaded",
        "HFLM._model_generate": "reasoning that think_end_token removes cannot be measured",
    },
}


def wrap(module: Any, path: str, instead: Callable[..., Any]) -> None:
    """Replace a function of a module, once per import.

    Inside a decorator, the decorated function is replaced: names bound earlier, as by
    ``from lm_eval import evaluate``, then lead to ours too.

    Args:
        module: a module of ``WRAPPED``.
        path: one of its functions, such as ``HarnessCLI.execute``; a warning says if it is gone.
        instead: called with the function and the arguments of every call of it.
    """
    *classes, name = path.split(".")
    try:
        owner = functools.reduce(getattr, classes, module)
        original = inspect.getattr_static(owner, name)
    except AttributeError:
        (without,) = (paths[path] for paths in WRAPPED.values() if path in paths)
        logger.warning("lm-eval-coupling: this lm-eval has no %s; %s", path, without)
        return
    plain: Any = original.__func__ if isinstance(original, classmethod) else original
    if getattr(plain, "_of_coupling", False):
        return
    if (inside := _decorated_by(plain)) is not None:
        inside.cell_contents = _calling(instead, inside.cell_contents)
        plain._of_coupling = True
        return
    wrapped = _calling(instead, plain)
    wrapped._of_coupling = True
    setattr(owner, name, classmethod(wrapped) if isinstance(original, classmethod) else wrapped)


def _calling(instead: Callable[..., Any], function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return instead(function, *args, **kwargs)

    return wrapped


def _decorated_by(function: Any) -> Any:
    """Return the closure cell that holds a decorated function; None for a plain function."""
    inside = getattr(function, "__wrapped__", None)
    cells = getattr(function, "__closure__", None) or ()
    return next(
        (cell for cell in cells if inside is not None and cell.cell_contents is inside), None
    )


def is_command_running() -> bool:
    """Return whether the caller was called, at some distance, by lm-eval's command line."""
    frames = traceback.walk_stack(None)
    return any(frame.f_globals.get("__name__") == "lm_eval._cli.run" for frame, _ in frames)


def split_nested_tasks(task_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the groups and the leaf tasks of the nested dictionary of older callers."""
    from lm_eval.evaluator_utils import _handle_back_comp

    return _handle_back_comp(dict(task_dict))


def encode_pair(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of context and continuation exactly as an `HFLM` feeds them."""
    return lm._encode_pair(context, continuation)


def wrap_reading_of_config(lm: Any, instead: Callable[..., None]) -> None:
    """Replace the step, if any, by which an `HFLM` reads its configuration before the weights.

    ``instead`` is called with the old step and its arguments. The ``__init__`` of ``lm`` has not
    yet run.
    """
    if (read := getattr(lm, "_get_config", None)) is not None:
        lm._get_config = functools.partial(instead, read)


def wrap_generation(lm: Any, instead: Callable[..., Any]) -> None:
    """Replace the step, if any, by which an `HFLM` generates token ids for a batch of contexts.

    ``instead`` is called with the old step and its arguments.
    """
    if (generate := getattr(lm, "_model_generate", None)) is not None:
        lm._model_generate = functools.partial(instead, generate)
