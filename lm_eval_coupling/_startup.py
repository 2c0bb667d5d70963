"""Runs plugin.py after certain modules of lm-eval; loaded at every interpreter start, so it imports next to nothing.

lm-eval 0.4.13 looks for no plugins. A meta-path finder answers for a few of its modules only, lets the ordinary finders
find them, and calls ``plugin.after_import`` once they have executed. ``LM_EVAL_COUPLING_NO_HOOK=1`` switches it off.
"""

import os
import sys
from _thread import get_ident  # `threading` would be most of the start-up cost

TYPE_CHECKING = (
    False  # a type checker takes it for true: no interpreter start is to pay for `typing`
)
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
            _run_after(spec.loader)
        return spec


def _run_after(loader: "Any") -> None:
    execute = loader.exec_module

    def exec_module(module: "Any") -> None:
        execute(module)
        try:
            from lm_eval_coupling.harness import plugin
        except ImportError:
            return  # the package is half removed
        plugin.after_import(module)

    loader.exec_module = exec_module


def install(asked: bool = False) -> None:
    """Put the finder first, once; the environment can forbid it where nobody ``asked``."""
    if os.environ.get("LM_EVAL_COUPLING_NO_HOOK") and not asked:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
