"""Digests of Python values: functions with what they close over, arrays, modules, plain objects.

Two values with one digest compute the same as part of a forward pass, in any process. A value
whose state cannot be read, such as a session of another runtime, is named as unreadable.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import hashlib
import io
import logging
import random
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice),
    *(type(...), Path, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
# Objects that a forward pass may use, and that do not change its result.
_WITHOUT_EFFECT = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Thread),
    *(io.IOBase, logging.Logger, logging.Handler),
)
_LIBRARIES = tuple(
    str(Path(module.__file__ or "/nowhere").resolve().parent.parent) for module in (torch, np)
) + (str(Path(dis.__file__).resolve().parent),)
_DEPTH = 12  # of values within values
# Names by which a function reads what no digest of it holds: files, the environment, chance.
_OUTSIDE = frozenset(
    (
        *("open", "environ", "getenv", "load", "loadtxt", "fromfile", "memmap"),
        *("read_text", "read_bytes", "urlopen", "rand", "randn", "rand_like", "randn_like"),
        *("randint", "randperm", "bernoulli", "bernoulli_", "multinomial", "normal_"),
        "uniform_",
    )
)


class Digester:
    """A digester of values that belong to one model.

    Attributes:
        unreadable: descriptions of the values whose state cannot be read.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Take the names of the model's own modules by their ids: their state is digested apart."""
        self.names = names
        self.unreadable: list[str] = []

    def digest(self, value: Any) -> str:
        """Return 16 hex digits of a value."""
        text = _Writer(self).write(value, 0)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def parts(self, function: Any) -> Iterator[tuple[str, str]]:
        """Yield the name and the digest of a callable's code and of every variable that it uses."""
        if isinstance(function, types.MethodType):
            yield from self.parts(function.__func__)
            yield from self._expand("self", function.__self__)
        elif isinstance(function, functools.partial):
            yield from self.parts(function.func)
            yield "arguments", self.digest((function.args, function.keywords))
        elif isinstance(function, types.FunctionType) and not is_of_library(function):
            self._note_outside(function.__code__)
            yield "code", self.digest(function.__code__)
            for name, value in variables(function).items():
                yield from self._expand(name, value)
        else:
            if is_of_user(function) and isinstance(type(function).__call__, types.FunctionType):
                self._note_outside(type(function).__call__.__code__)
            yield from self._expand("self", function)

    def _note_outside(self, code: types.CodeType) -> None:
        """Note as unreadable what a function reads that no digest of it holds."""
        self.unreadable += [f"call of {name}" for name in sorted(_outside_names(code))]

    def _expand(self, name: str, value: Any) -> Iterator[tuple[str, str]]:
        """Yield the digests of a value's items: passes may change some, such as counters."""
        if type(value) is dict and all(isinstance(key, str) for key in value):
            for key, item in value.items():
                yield f"{name}[{key!r}]", self.digest(item)
        elif is_of_user(value) and id(value) not in self.names:
            yield f"class of {name}", self.digest(type(value))
            for key, item in _attributes(value).items():
                yield f"{name}.{key}", self.digest(item)
        else:
            yield name, self.digest(value)


def is_of_user(value: Any) -> bool:
    """Return whether a value is an object with attributes whose class is in no library."""
    kind = type(value)
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    return not is_library_module(kind.__module__) and kind is not types.FunctionType


def variables(function: types.FunctionType) -> dict[str, Any]:
    """Return the defaults, the closure and the used globals of a function by their names."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    values: dict[str, Any] = {}
    for number, default in enumerate(function.__defaults__ or ()):
        values[f"default {number}"] = default
    values |= function.__kwdefaults__ or {}
    for name, cell in cells.items():
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not filled yet
            values[name] = None
    for name in global_names(function.__code__):
        if name in function.__globals__:
            values[name] = value = function.__globals__[name]
            if isinstance(value, types.ModuleType) and not is_library_module(value.__name__):
                for attribute in function.__code__.co_names:
                    if attribute in vars(value):
                        values[f"{name}.{attribute}"] = vars(value)[attribute]
    return values


def global_names(code: types.CodeType) -> list[str]:
    """Return the names of the globals that code and the functions inside it load."""
    names = {
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(global_names(constant))
    return sorted(names)


def _outside_names(code: types.CodeType) -> set[str]:
    """Return the names in code, and in the functions inside it, of what no digest holds."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(_OUTSIDE.intersection(code.co_names)).union(*map(_outside_names, inner))


def checksum(tensor: Tensor) -> list[int]:
    """Return plain and position-weighted sums of the tensor's bits, the same on every device."""
    bits = tensor.detach()
    if bits.is_complex():
        bits = torch.view_as_real(bits.resolve_conj())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
    bits = bits.contiguous().view(-1).view(integer)
    weights = torch.arange(1, min(CHUNK, bits.numel()) + 1, device=bits.device)
    sums = [0, 0]
    for i, chunk in enumerate(bits.split(CHUNK)):
        wide = chunk.to(torch.int64)
        sums[0] += (i + 1) * int(wide.sum())
        sums[1] += (i + 1) * int((wide * weights[: wide.numel()]).sum())
    return sums


CHUNK = 1 << 22  # entries that are summed at a time


class _Writer:
    """The text of one value, in which repeated and recursive values are named by their number."""

    def __init__(self, digester: Digester) -> None:
        self.digester = digester
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # an id is given again once its object is gone

    def write(self, value: Any, depth: int) -> str:
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}"
        if id(value) in self.digester.names:
            return f"module {self.digester.names[id(value)]}"
        if id(value) in self.seen:
            return f"again {self.seen[id(value)]}"
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        if depth > _DEPTH:
            return self._unreadable(value)
        return self._write_object(value, depth + 1)

    def _write_object(self, value: Any, depth: int) -> str:
        if isinstance(value, Tensor):
            return _tensor(value) or self._unreadable(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value), depth)
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__} {value.name}"
        if isinstance(value, collections.UserDict):
            return self.write(value.data, depth)
        if isinstance(value, Mapping):
            items = [f"{self.write(k, depth)}: {self.write(v, depth)}" for k, v in value.items()]
            return f"{type(value).__qualname__} {_hash(items)}"
        if isinstance(value, set | frozenset):
            return f"set {_hash(sorted(self.digester.digest(item) for item in value))}"
        if isinstance(value, list | tuple | collections.deque):
            return f"{type(value).__qualname__} {_hash(self.write(v, depth) for v in value)}"
        if isinstance(value, types.CodeType):
            return self._code(value, depth)
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType | np.ufunc):
            return f"{type(value).__qualname__} {getattr(value, '__name__', '')}"
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return self._callable(value, depth)
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        return self._instance(value, depth)

    def _array(self, value: np.ndarray, depth: int) -> str:
        if value.dtype.hasobject:
            return self.write(value.tolist(), depth)
        digest = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return f"array {value.dtype} {value.shape} {digest}"

    def _code(self, code: types.CodeType, depth: int) -> str:
        constants = [self.write(constant, depth) for constant in code.co_consts]
        parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_freevars), *constants]
        return f"code {_hash(parts)}"

    def _callable(self, value: Any, depth: int) -> str:
        if isinstance(value, functools.partial):
            parts: tuple[Any, ...] = (value.func, value.args, value.keywords)
            return "partial " + " ".join(self.write(part, depth) for part in parts)
        if isinstance(value, types.MethodType):
            parts = (value.__func__, value.__self__)
            return "method " + " ".join(self.write(part, depth) for part in parts)
        if is_of_library(value):
            return f"function {value.__module__}.{value.__qualname__}"
        used = [f"{k}: {self.write(v, depth)}" for k, v in variables(value).items()]
        return f"function {self.write(value.__code__, depth)} {_hash(used)}"

    def _class(self, kind: type, depth: int) -> str:
        name = f"class {kind.__module__}.{kind.__qualname__}"
        if kind.__module__ == "builtins" or is_library_module(kind.__module__):
            return name
        methods = [
            f"{key}: {self.write(value, depth)}"
            for key, value in sorted(vars(kind).items())
            if isinstance(value, types.FunctionType | staticmethod | classmethod | property)
            or isinstance(
                value, int | float | str | list | tuple | dict | set | Tensor | np.ndarray
            )
            and not key.startswith("__")
        ]
        bases = [self.write(base, depth) for base in kind.__bases__]
        return f"{name} {_hash([*methods, *bases])}"

    def _module(self, module: nn.Module, depth: int) -> str:
        state = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        parts = [self.write(type(module), depth)]
        for name, value in [*state, *module.named_children(), *_attributes(module).items()]:
            parts.append(f"{name}: {self.write(value, depth)}")
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            parts += [self.write(hook, depth) for hook in hooks.values()]
        return f"module {_hash(parts)}"

    def _instance(self, value: Any, depth: int) -> str:
        if isinstance(value, _WITHOUT_EFFECT):
            return type(value).__qualname__
        if isinstance(value, staticmethod | classmethod):
            return self.write(value.__func__, depth)
        if isinstance(value, property):
            return self.write(value.fget, depth)
        if isinstance(value, types.CellType):
            return self.write(value.cell_contents, depth)
        if isinstance(value, weakref.ReferenceType):
            return self.write(value(), depth)
        if isinstance(value, torch.Generator):
            return f"generator {self.write(value.get_state(), depth)}"
        if isinstance(value, random.Random):
            return f"random {self.write(value.getstate(), depth)}"
        if isinstance(value, np.random.Generator):
            return f"random {self.write(value.bit_generator.state, depth)}"
        slots = {
            name: getattr(value, name)
            for kind in type(value).__mro__
            for name in getattr(kind, "__slots__", ())
            if isinstance(name, str) and hasattr(value, name) and not name.startswith("__")
        }
        attributes = slots | _attributes(value)
        if not attributes and type(value).__reduce__ is object.__reduce__:
            if is_library_module(type(value).__module__) or not _is_python_class(type(value)):
                return self._unreadable(value)
        parts = [f"{name}: {self.write(item, depth)}" for name, item in sorted(attributes.items())]
        return f"object {self.write(type(value), depth)} {_hash(parts)}"

    def _unreadable(self, value: Any) -> str:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        self.digester.unreadable.append(kind)
        return f"unreadable {kind}"


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part} ".encode())
    return digest.hexdigest()[:24]


def _tensor(tensor: Tensor) -> str:
    """Return the text of a tensor, empty if its numbers cannot be read."""
    about = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
    if tensor.device.type == "meta":
        return about
    try:
        plain = tensor.to_dense() if tensor.layout != torch.strided else tensor
        return f"{about} {checksum(plain)}"
    except (RuntimeError, TypeError, KeyError, NotImplementedError):
        return ""


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's own attributes, without those that every module has."""
    own = MODULE_ATTRIBUTES if isinstance(value, nn.Module) else ()
    return {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in own}


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _is_python_class(kind: type) -> bool:
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def is_of_library(function: Any) -> bool:
    """Return whether a function lies in an installed package or in Python's own library."""
    file = function.__code__.co_filename
    if file.startswith("<"):  # frozen modules, and methods that dataclasses make
        return file.startswith("<frozen") or (
            file == "<string>" and is_library_module(function.__module__ or "")
        )
    return file.startswith(_LIBRARIES)


def is_library_module(name: str) -> bool:
    """Return whether a module is of an installed package or of Python's own library."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names and root != "__main__":
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is not None and str(Path(file)).startswith(_LIBRARIES)
