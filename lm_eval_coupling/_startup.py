"""Import hook that patches a few modules of lm-eval once they have been executed.

lm-eval 0.4.13 looks for no plugins. A meta-path finder answers for the modules of ``MODULES``, lets
the ordinary finders find them, and calls ``hooks.after_import`` after their execution. Every start
of the interpreter loads this module, so it imports next to nothing.
``LM_EVAL_COUPLING_NO_HOOK=1`` switches the hook off.
"""

import os
import sys
from _thread import get_ident  # `threading` would be most of the start-up cost.

# Not imported from `typing`, for which every start of the interpreter would pay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODULES = frozenset(
    {
        "lm_eval.utils",
        "lm_eval.models",
        "lm_eval.tasks.manager",
        "lm_eval.config.evaluate_config",
        "lm_eval.evaluator",
        "lm_eval.loggers.evaluation_tracker",
        "lm_eval.loggers.wandb_logger",
        "lm_eval.loggers.trackio_logger",
        "lm_eval._cli.harness",
    }
)


class _Finder:
    def __init__(self) -> None:
        self._searching: set[tuple[int, str]] = set()

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name not in MODULES:
            return None
        # Two hooks of this kind that ask each other would recurse for ever.
        search = (get_ident(), name)
        if search in self._searching:
            return None
        self._searching.add(search)
        try:
            import importlib.util

            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(search)
        if spec is not None and spec.loader is not None:
            _call_plugin_after(spec.loader, name)
        return spec


def _call_plugin_after(loader: "Any", name: str) -> None:
    """Let ``loader`` call the plugin once, after it has executed the module ``name``."""
    execute = loader.exec_module

    def exec_module(module: "Any") -> None:
        # A zip archive has one loader for all of its modules.
        if module.__name__ != name:
            return execute(module)
        loader.exec_module = execute
        execute(module)
        try:
            from lm_eval_coupling.harness import hooks
        except ImportError:
            return None  # The package is half removed: lm-eval goes on without it.
        return hooks.after_import(module)

    loader.exec_module = exec_module


def is_switched_off() -> bool:
    """Return whether ``LM_EVAL_COUPLING_NO_HOOK`` forbids the hook; ``0`` does not."""
    value = os.environ.get("LM_EVAL_COUPLING_NO_HOOK", "")
    return value.strip().lower() not in ("", "0", "false", "no")


def install(forced: bool = False) -> None:
    """Put the finder first on the meta path, once; ``forced`` overrides the environment."""
    if is_switched_off() and not forced:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
