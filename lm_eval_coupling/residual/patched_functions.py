"""Functions that a user put into the classes and modules of libraries; they act on a forward pass.

Some ten thousand are looked through at every comparison of a model with what it was, so what a
class or module held the time before is remembered.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lm_eval_coupling.residual.function_variables import (
    FRAMEWORKS,
    is_library_module,
    is_of_library,
)
from lm_eval_coupling.residual.object_digest import is_of_user

# Where functions are looked up whose replacement acts on the models of a process.
_NAMESPACES = ("torch.nn.functional", "torch")
_PYTHON_FUNCTIONS = (types.FunctionType, functools.partial)
_OF_TORCH = ("torch", "typing_extensions")  # whose functions torch itself puts there


def patched_functions(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """Yield the functions that the user put into classes and modules of libraries.

    Args:
        named: the modules of a model; transformers' own are looked through whatever the model is.
    """
    for owner, holder in sorted(_owners(named).items()):
        contents = _SEEN.get(owner)
        if contents is None or not contents.is_of(holder):
            contents = _SEEN[owner] = _Contents(owner, holder)
        for name, function in contents.of_user:
            yield f"forward pass's function {owner}.{name}", function


def _owners(named: Iterable[tuple[str, nn.Module]]) -> dict[str, Any]:
    """Return the classes of the modules, and the Python modules of transformers, by name."""
    kinds = {kind for _, module in named for kind in type(module).__mro__}
    return _python_modules() | {
        f"{kind.__module__}.{kind.__qualname__}": kind
        for kind in kinds
        if f"{kind.__module__}.".startswith(FRAMEWORKS)
    }


def _python_modules() -> dict[str, Any]:
    """Return transformers' and two of torch's, as Python has loaded them by now."""
    global _LOADED
    names = list(sys.modules)
    if names != _LOADED[0]:
        ours = [n for n in names if n in _NAMESPACES or n.startswith("transformers.")]
        _LOADED = names, ours
    modules = {name: sys.modules[name] for name in _LOADED[1]}
    return {n: module for n, module in modules.items() if type(module) is types.ModuleType}


class _Contents:
    """What a class or module holds, and which functions among it are the user's.

    Attributes:
        of_user: names and functions.
    """

    def __init__(self, owner: str, holder: Any) -> None:
        held = dict(vars(holder))
        self._names, self._values = list(held), list(held.values())
        self._functions = [f for value in self._values for f in _with_wrapped(value)]
        self._codes = list(map(_CODE, self._functions))
        may_be = {kind for kind in map(type, self._values) if _may_be_of_user(kind)}
        self.of_user = [
            (name, value)
            for name, value in held.items()
            if type(value) in may_be and _is_of_user(value, owner)
        ]

    def is_of(self, holder: Any) -> bool:
        """Return whether it holds the same objects under the same names, with the same code."""
        names, values = list(vars(holder)), list(vars(holder).values())
        return (
            names == self._names
            and all(map(operator.is_, values, self._values))
            and all(map(operator.is_, map(_CODE, self._functions), self._codes))
        )


# All of Python's modules when they were last looked through, and those of them that count.
_LOADED: tuple[list[str], list[str]] = [], []
_SEEN: dict[str, _Contents] = {}
_CODE = operator.attrgetter("__code__")


def _with_wrapped(value: Any) -> Iterator[types.FunctionType]:
    """Yield a function, or that of a partial one, and those that it wraps."""
    function = value.func if isinstance(value, functools.partial) else value
    while isinstance(function, types.FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _may_be_of_user(kind: type) -> bool:
    """Return False for the kinds of most values: classes, texts and built-in functions."""
    return issubclass(kind, _PYTHON_FUNCTIONS) or not is_library_module(kind.__module__)


def _is_of_user(value: Any, owner: str) -> bool:
    """Return whether a user put a function there, or another library into torch."""
    if isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, types.FunctionType):
        is_own = not is_library_module(type(value).__module__)
        return is_own and callable(value) and is_of_user(value)
    if not is_of_library(value):
        return True
    if owner not in _NAMESPACES:
        return False
    root = str(value.__globals__.get("__name__")).partition(".")[0]
    return root not in sys.stdlib_module_names and root not in _OF_TORCH
