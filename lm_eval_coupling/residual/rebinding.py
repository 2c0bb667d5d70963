"""Functions of the user that refer to a model's modules, made to refer to the twin's."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lm_eval_coupling.residual.function_variables import global_names
from lm_eval_coupling.residual.object_digest import is_of_user

_DEPTH = 6


class Rebinding:
    """Replaces modules of one tree by those of another in functions, methods and containers.

    A value in which no module of the tree occurs is returned itself, so that a hook goes on
    writing to the user's own lists.
    """

    def __init__(self, twins: Mapping[int, nn.Module]) -> None:
        """Take the other tree's modules by the ids of the first one's."""
        self.twins = twins

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """Return the value with the other tree's modules in it."""
        if id(value) in self.twins:
            return self.twins[id(value)]
        if depth > _DEPTH:
            return value
        rebind: Callable[[Any], Any] = functools.partial(self, depth=depth + 1)
        if isinstance(value, types.MethodType):
            owner = self._owner(value.__self__, depth + 1)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            other = tuple(map(rebind, parts))
            if all(a is b for a, b in zip(parts, other, strict=True)):
                return value
            return functools.partial(other[0], *other[1], **other[2])
        if isinstance(value, types.FunctionType):
            return self._function(value, rebind)
        if callable(value) and is_of_user(value):
            return self._owner(value, depth + 1)
        if type(value) in (list, tuple, set):
            items = [rebind(item) for item in value]
            unchanged = all(a is b for a, b in zip(value, items, strict=True))
            return value if unchanged else type(value)(items)
        if type(value) is dict:
            pairs = [(key, item, rebind(key), rebind(item)) for key, item in value.items()]
            if all(key is k and item is i for key, item, k, i in pairs):
                return value
            return {k: i for _, _, k, i in pairs}
        return value

    def _owner(self, owner: Any, depth: int) -> Any:
        """Return the object of a bound method, or a copy of it that holds the twin's modules."""
        if id(owner) in self.twins or isinstance(owner, nn.Module | type):
            return self.twins.get(id(owner), owner)
        changed = {
            name: other
            for name, item in getattr(owner, "__dict__", {}).items()
            if (other := self(item, depth)) is not item
        }
        if not changed:
            return owner
        other = copy.copy(owner)
        vars(other).update(changed)
        return other

    def _function(self, function: types.FunctionType, rebind: Callable[[Any], Any]) -> Any:
        cells = [self._cell(cell, rebind) for cell in function.__closure__ or ()]
        named = {
            name: (item, rebind(item))
            for name in global_names(function.__code__)
            if (item := function.__globals__.get(name)) is not None
            and not isinstance(item, types.FunctionType | types.ModuleType)
        }
        namespace = {name: other for name, (item, other) in named.items() if item is not other}
        defaults = rebind(function.__defaults__)
        keywords = rebind(function.__kwdefaults__)
        if not namespace and defaults is function.__defaults__:
            if keywords is function.__kwdefaults__ and all(
                a is b for a, b in zip(cells, function.__closure__ or (), strict=True)
            ):
                return function
        other = types.FunctionType(
            function.__code__,
            {**function.__globals__, **namespace} if namespace else function.__globals__,
            function.__name__,
            defaults,
            tuple(cells),
        )
        other.__kwdefaults__ = keywords
        other.__dict__.update(vars(function))
        other.__module__, other.__qualname__ = function.__module__, function.__qualname__
        return other

    def _cell(self, cell: types.CellType, rebind: Callable[[Any], Any]) -> types.CellType:
        try:
            contents = cell.cell_contents
        except ValueError:  # not filled yet
            return cell
        other = rebind(contents)
        return cell if other is contents else types.CellType(other)
