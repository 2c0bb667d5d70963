"""Plain data for settings that hold Python objects, equal in every process and on every machine."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import PurePath
from types import CellType, CodeType
from typing import Any

from lm_eval_coupling.saved.answer_settings import without_addresses


def digest(value: Any) -> str:
    """Return 16 hex digits that identify a text or nested settings."""
    written = value if isinstance(value, str) else json.dumps(plain(value), sort_keys=True)
    return hashlib.sha256(written.encode(errors="surrogatepass")).hexdigest()[:16]


def plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Return any value as texts, numbers, None, and lists and dictionaries of them.

    Functions become their name, source, defaults and closure, other objects their class and state.
    Addresses, folders of files and the order of sets are left out: they differ among processes and
    machines. ``inside`` are the ids of the objects that contain the value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, Mapping):
        parts = {str(key): plain(part, inside) for key, part in value.items()}
        if len(parts) == len(value):
            return parts
        pairs = [[plain(key, inside), plain(part, inside)] for key, part in value.items()]
        return sorted(pairs, key=json.dumps)
    if isinstance(value, list | tuple):
        return [plain(part, inside) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(part, inside) for part in value), key=json.dumps)
    if isinstance(value, functools.partial):
        return {"partial": plain([value.func, value.args, value.keywords], inside)}
    if inspect.ismethod(value):
        return [plain(value.__func__, inside), plain(value.__self__, inside)]
    if inspect.isroutine(value) or inspect.isclass(value):
        return _written(value, inside)
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        fields = {name: getattr(value, name, None) for name in names}
        return [type(value).__qualname__, plain(fields, inside)]
    if callable(getattr(value, "tolist", None)):  # of numpy and torch
        return plain(value.tolist(), inside)
    if vars_of := getattr(value, "__dict__", None):
        return [_written(type(value), inside), plain(vars_of, inside)]
    return [type(value).__qualname__, _state(value, inside)]


def _state(value: Any, inside: tuple[int, ...]) -> Any:
    """Convert an object without attributes to what pickle would keep of it, or to its text."""
    try:
        reduce = copyreg.dispatch_table.get(type(value), lambda value: value.__reduce_ex__(2))
        reduced = reduce(value)
        # Items, which come last, are given as iterators.
        parts = [*reduced[1:3], *(list(items or ()) for items in reduced[3:5])]
    except Exception:
        return without_addresses(repr(value))
    return without_addresses(reduced) if isinstance(reduced, str) else plain(parts, inside)


def _written(value: Any, inside: tuple[int, ...]) -> Any:
    """Convert a function or class to its name, its source, and defaults and values in a closure."""
    value = inspect.unwrap(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    try:
        source: Any = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # typed in, made by exec, or not written in Python
        code = getattr(value, "__code__", None)
        source = None if code is None else _instructions(code)
    bound = [_contents(cell) for cell in getattr(value, "__closure__", None) or ()]
    bound += getattr(value, "__defaults__", None) or ()
    bound += (getattr(value, "__kwdefaults__", None) or {}).values()
    return [name, source, plain(bound, inside)] if bound else [name, source]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _instructions(code: CodeType) -> list[Any]:
    constants = [
        _instructions(part) if isinstance(part, CodeType) else plain(part)
        for part in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]
