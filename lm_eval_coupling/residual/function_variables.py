"""Functions as a program sees them: whose code it is, and which variables it reads."""

from __future__ import annotations

import dis
import functools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

_LIBRARIES = tuple(
    str(Path(module.__file__ or "/nowhere").resolve().parent.parent) for module in (torch, np)
) + (str(Path(dis.__file__).resolve().parent),)
FRAMEWORKS = ("torch.", "transformers.", "accelerate.", "peft.", "lm_eval_coupling.")
_PLACES = 3  # levels of modules within modules


def variables(function: types.FunctionType) -> dict[str, Any]:
    """Return the variables of a function by name: defaults, closure, attributes, used globals.

    Of a library's function, the closure alone: the rest is the release's.
    """
    code = function.__code__
    values: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not filled yet
            values[name] = None
    if is_of_library(function):
        return values
    for number, default in enumerate(function.__defaults__ or ()):
        values[f"default {number}"] = default
    values |= function.__kwdefaults__ or {}
    values |= {f"{function.__name__}.{name}": value for name, value in vars(function).items()}
    for name in global_names(code):
        if name in function.__globals__:
            values[name] = function.__globals__[name]
    read = names_in(code)
    for name, value in list(values.items()):
        values |= _of_python_module(name, value, read)
    return values


def _of_python_module(name: str, value: Any, read: set[str], depth: int = 0) -> dict[str, Any]:
    """Return the variables of the user's own Python modules that code reads."""
    values: dict[str, Any] = {}
    if not isinstance(value, types.ModuleType) or is_library_module(value.__name__):
        return values
    for attribute in sorted(read & vars(value).keys()) if depth < _PLACES else ():
        place = f"{name}.{attribute}"
        values[place] = item = vars(value)[attribute]
        values |= _of_python_module(place, item, read, depth + 1)
    return values


def global_names(code: types.CodeType) -> list[str]:
    """Return the names of the globals that code and the functions inside it load."""
    names = {
        str(instruction.argval)
        for part in _with_inner(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return sorted(names)


def names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes that code mentions, also in a text alone."""
    parts = _with_inner(code)
    texts = {c for part in parts for c in part.co_consts if isinstance(c, str) and c.isidentifier()}
    return texts.union(*(part.co_names for part in parts))


def _with_inner(code: types.CodeType) -> list[types.CodeType]:
    """Return code and that of the functions inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(part for constant in inner for part in _with_inner(constant))]


def is_of_library(function: types.FunctionType) -> bool:
    """Return whether a function lies in an installed package or in Python's own library.

    A library's decorator around a user's function is the user's.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if isinstance(wrapped, types.FunctionType) and not is_of_library(wrapped):
        return False
    file = function.__code__.co_filename
    if file.startswith("<"):  # frozen modules, and methods that dataclasses make
        return file.startswith("<frozen") or (
            file == "<string>" and is_library_module(function.__module__ or "")
        )
    return file.startswith(_LIBRARIES)


def is_of_framework(value: Any) -> bool:
    """Return whether a function, or an object's class, is of torch, transformers, PEFT or ours.

    The module in which its code was written decides, and that of every function that it wraps:
    `functools.wraps` gives a user's function the name of another module.
    """
    while value is not None:
        inner = value.func if isinstance(value, functools.partial) else value
        inner = inner.__func__ if isinstance(inner, types.MethodType) else inner
        if isinstance(inner, types.FunctionType):
            module = inner.__globals__.get("__name__")
        else:
            is_builtin = isinstance(inner, types.BuiltinFunctionType)
            module = inner.__module__ if is_builtin else type(inner).__module__
        if not f"{module}.".startswith(FRAMEWORKS):
            return False
        # Not by `getattr`: some of torch's own objects have any attribute.
        value = getattr(inner, "__dict__", {}).get("__wrapped__")
    return True


def is_library_module(name: str) -> bool:
    """Return whether a module is of an installed package or of Python's own library."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names and root != "__main__":
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is not None and _is_library_file(file)


@functools.cache
def _is_library_file(file: str) -> bool:
    return str(Path(file)).startswith(_LIBRARIES)
