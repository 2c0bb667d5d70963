"""Digests of Python values: functions with what they close over, arrays, modules, plain objects.

Two values with one digest compute the same as part of a forward pass, in any process. A value
whose state cannot be read, such as a session of another runtime, is named as unreadable.
"""

from __future__ import annotations

import argparse
import collections
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

from lm_eval_coupling.residual.function_variables import (
    is_library_module,
    is_of_framework,
    is_of_library,
    names_in,
    variables,
)

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice),
    *(type(...), Path, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_FUNCTIONS = types.FunctionType | types.MethodType | functools.partial
# Objects that a forward pass may use, and that do not change its result.
_WITHOUT_EFFECT = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Thread),
    *(io.IOBase, logging.Logger, logging.Handler),
)
_DEPTH = 12  # of values within values
_PLACES = 3  # levels of values that get places of their own, and the most items of such a value
_ITEMS = 64
# Names by which a function reads what no digest of it holds: files, the environment, chance.
_OUTSIDE = frozenset(
    (
        *("open", "safe_open", "environ", "getenv", "load", "load_file", "loadtxt", "fromfile"),
        *("memmap", "read_text", "read_bytes", "read_csv", "read_parquet", "urlopen", "connect"),
        *("globals", "eval", "exec", "import_module", "rand", "randn", "rand_like", "randn_like"),
        *("randint", "randperm", "bernoulli", "bernoulli_", "multinomial", "normal", "normal_"),
        "uniform_",
    )
)


class Digester:
    """A digester of values that belong to one model.

    Attributes:
        unreadable: descriptions of the values whose state cannot be read.
        names_read: names that the user's code mentions, such as those of attributes.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Take the names of the model's own modules by their ids: their state is digested apart."""
        self.names = names
        self.unreadable: list[str] = []
        self.names_read: set[str] = set()

    def digest(self, value: Any) -> str:
        """Return 16 hex digits of a value."""
        text = _Writer(self).write(value, 0)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def parts(self, function: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
        """Yield the name and the digest of a callable's code and of every variable that it uses."""
        if isinstance(function, types.MethodType):
            yield from self.parts(function.__func__, depth)
            yield from self._expand("self", function.__self__, depth)
        elif isinstance(function, functools.partial):
            yield from self.parts(function.func, depth)
            given = {f"argument {n}": value for n, value in enumerate(function.args)}
            for name, value in (given | function.keywords).items():
                yield from self._expand(name, value, depth)
        elif isinstance(function, types.FunctionType):
            yield "code", self.digest(_code_of(function))
            for name, value in variables(function).items():
                yield from self._expand(name, value, depth)
        else:
            yield from self._expand("self", function, depth)

    def _expand(self, name: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
        """Yield the digests of a value's items: passes may change some, such as counters."""
        is_whole = depth >= _PLACES or id(value) in self.names
        if isinstance(value, _FUNCTIONS) and not is_whole:
            yield from (
                (f"{name}, {part}", digits) for part, digits in self.parts(value, depth + 1)
            )
            return
        items = {} if is_whole else _items(name, value)
        if not items:
            yield name, self.digest(value)
        elif is_of_user(value):
            yield f"class of {name}", self.digest(type(value))
        for place, item in items.items():
            yield from self._expand(place, item, depth + 1)


def _items(name: str, value: Any) -> dict[str, Any]:
    """Return a value's items by their places; none for a value that is digested in one."""
    items: dict[str, Any] = {}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        items = {f"{name}[{key!r}]": item for key, item in value.items()}
    elif type(value) in (list, tuple):
        items = {f"{name}[{number}]": item for number, item in enumerate(value)}
        items[f"{name}{LENGTH}"] = len(value)
    elif is_of_user(value):
        items = {f"{name}.{key}": item for key, item in _attributes(value).items()}
    return items if len(items) <= _ITEMS else {}


LENGTH = ", length"


def is_among(place: str, changing: Iterable[str]) -> bool:
    """Return whether a place, or a value that it lies in, is among the changing ones.

    A list whose length changes is a collector: all of its items are.
    """
    return any(
        place == other or place.startswith((f"{other}[", f"{other}.", f"{other}, "))
        for other in map(lambda name: name.removesuffix(LENGTH), changing)
    )


def is_of_user(value: Any) -> bool:
    """Return whether a value is an object with attributes, neither Python's nor a framework's.

    Other libraries bring hooks as the user does.
    """
    if isinstance(value, types.SimpleNamespace | argparse.Namespace):
        return True
    if isinstance(value, nn.Module | type | np.ndarray | _FUNCTIONS):
        return False
    return hasattr(value, "__dict__") and not _is_from_python(value) and not is_of_framework(value)


def is_of_python(value: Any) -> bool:
    """Return whether a value is of a class of Python's own, and may change a forward pass."""
    if isinstance(value, type):
        return not is_library_module(value.__module__)
    return _is_from_python(value) and not isinstance(
        value, (*_WITHOUT_EFFECT, types.ModuleType, weakref.ReferenceType)
    )


def _is_from_python(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in sys.stdlib_module_names


def _code_of(function: types.FunctionType) -> types.CodeType | str:
    """Return a function's code, or the name of a library's function: releases differ in code."""
    if is_of_library(function):
        return f"{function.__module__}.{function.__qualname__}"
    return function.__code__


def checksum(tensor: Tensor) -> list[int]:
    """Return two sums over the tensor's bits, the same on every device.

    Bits are whole numbers as wide as an entry. The first sum weights them by their chunk, the
    second by their chunk and their place in it. Sums may overflow, which tells tensors apart as
    well. Shape and dtype do not enter.
    """
    values = tensor.detach().resolve_conj().resolve_neg()
    if values.is_complex():
        values = torch.view_as_real(values)
    size = values.element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = values.contiguous().view(-1).view(integer)
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
        self.is_called = True  # False within methods that no code read so far calls

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
        if hasattr(type(value), "__array__"):  # of NumPy, pandas or JAX
            try:
                return self._array(np.asarray(value), depth)
            except Exception:  # on a device, as of CuPy
                return self._unreadable(value)
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
        if isinstance(value, types.ModuleType | np.ufunc):
            return f"{type(value).__qualname__} {getattr(value, '__name__', '')}"
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, _FUNCTIONS):
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
        if self.is_called:
            self.digester.names_read |= names_in(code)
            outside = sorted(_OUTSIDE.intersection((*code.co_names, *code.co_freevars)))
            self.digester.unreadable += [f"call of {name}" for name in outside]
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
        used = [f"{k}: {self.write(v, depth)}" for k, v in variables(value).items()]
        return f"function {self.write(_code_of(value), depth)} {_hash(used)}"

    def _class(self, kind: type, depth: int) -> str:
        name = f"class {kind.__module__}.{kind.__qualname__}"
        if kind.__module__ == "builtins" or is_library_module(kind.__module__):
            return name
        members = {key: value for key, value in vars(kind).items() if _is_member(key, value)}
        texts: dict[str, str] = {}
        was_called = self.is_called
        while left := members.keys() - texts.keys():
            called = left & (self.digester.names_read | {"__call__", "forward"})
            self.is_called = was_called and bool(called)
            key = min(called or left)
            texts[key] = f"{key}: {self.write(members[key], depth)}"
        self.is_called = was_called
        bases = [self.write(base, depth) for base in kind.__bases__]
        return f"{name} {_hash([*(texts[key] for key in sorted(texts)), *bases])}"

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
        kind = type(value)
        if not attributes and (is_library_module(kind.__module__) or not _is_python_class(kind)):
            return self._reduced(value, depth)
        parts = [f"{name}: {self.write(item, depth)}" for name, item in sorted(attributes.items())]
        return f"object {self.write(kind, depth)} {_hash(parts)}"

    def _reduced(self, value: Any, depth: int) -> str:
        """Write an object that shows no attributes by what pickle would keep of it."""
        try:
            reduced = value.__reduce_ex__(2)
            # Items, which come last, are given as iterators.
            items = [] if isinstance(reduced, str) else [list(part or ()) for part in reduced[3:]]
            state = [reduced] if isinstance(reduced, str) else [*reduced[1:3], *items]
        except Exception:
            return self._unreadable(value)
        return f"object {self.write(type(value), depth)} {self.write(state, depth)}"

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


def _is_member(key: str, value: Any) -> bool:
    """Return whether a class attribute is a method, or a value that methods may read."""
    if isinstance(value, types.FunctionType | staticmethod | classmethod | property):
        return True
    hidden = type | types.MemberDescriptorType | types.GetSetDescriptorType
    return not key.startswith(("__", "_abc_")) and not isinstance(value, hidden)


def _is_python_class(kind: type) -> bool:
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE: made by a class statement
