"""Which rooms of the house may know which, and what its files look like: read off the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lm_eval_coupling"
READERS = ("saved", "statistics", "fit", "figures", "report")
DOORS = ("harness", "texts", "cli", "demo", "check", "vision", "sweep")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The part of the package that a module belongs to: its folder, or itself at the top."""
    return (module.split(".") + [""])[1]


@cache
def imports(module: str, everywhere: bool = True) -> frozenset[str]:
    """What a module imports: modules of ours in full, top-level names of others; at its top alone unless ``everywhere``."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = _run_sometime(tree) if everywhere else iter(_at_the_top(tree.body))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return frozenset(name if name in MODULES else name.split(".")[0] for name in found)


def _run_sometime(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run_sometime(node)


def _at_the_top(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run on import, those for type checkers alone left out."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.If):
            found += (
                []
                if "TYPE_CHECKING" in ast.unparse(node.test)
                else _at_the_top([*node.body, *node.orelse])
            )
        elif isinstance(node, ast.Try):
            found += _at_the_top([*node.body, *node.orelse, *node.finalbody])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += _at_the_top(node.body) if isinstance(node, ast.ClassDef) else [node]
    return found


def reached(module: str) -> set[str]:
    """Modules that importing this one loads, others' by their top-level name."""
    found, waiting = set(), [module]
    while waiting:
        for name in imports(waiting.pop(), everywhere=False) - found:
            found.add(name)
            if name in MODULES:
                waiting.append(name)
                package = name.rpartition(".")[0]
                waiting += [package] if package in MODULES else []
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in READERS])
def test_what_reads_and_draws_loads_no_torch(module):
    assert not reached(module) & {"torch", "transformers", "lm_eval", "transformer_lens"}


@pytest.mark.parametrize(
    ("library", "rooms"),
    [("lm_eval", DOORS), ("transformer_lens", ("residual",)), ("matplotlib", ("figures",))],
)
def test_a_library_is_known_in_its_rooms_alone(library, rooms):
    knowing = {name for name in MODULES if library in imports(name, everywhere=False)}
    assert {name for name in knowing if room(name) not in rooms} == set()


def test_lm_eval_is_named_by_its_doors_alone():
    assert {
        name for name in MODULES if "lm_eval" in imports(name) and room(name) not in DOORS
    } == set()


@pytest.mark.parametrize(
    ("of", "allowed"),
    [
        ("numerics", {"errors", "numerics"}),
        ("statistics", {"errors", "statistics"}),
        ("residual", {"errors", "numerics", "residual", "saved"}),
        ("jacobians", {"errors", "numerics", "jacobians"}),
        ("measures", {"errors", "numerics", "jacobians", "measures"}),
        ("saved", {"errors", "measures", "saved"}),
        ("figures", {"errors", "measures", "statistics", "figures"}),
    ],
)
def test_rooms_know_no_more_than_they_need(of, allowed):
    known = {
        (name, other)
        for name in MODULES
        if room(name) == of
        for other in imports(name)
        if other in MODULES
    }
    assert {pair for pair in known if room(pair[1]) not in {*allowed, ""}} == set()


def test_imports_run_in_no_circle():
    graph = {
        name: {other for other in imports(name, everywhere=False) if other in MODULES} - {name}
        for name in MODULES
    }
    while free := [name for name, needed in graph.items() if not needed]:
        for name in free:
            del graph[name]
        for needed in graph.values():
            needed.difference_update(free)
    assert graph == {}


def test_a_file_is_one_idea():
    assert {
        name
        for name, path in MODULES.items()
        if len(path.read_text(encoding="utf-8").splitlines()) > 400
    } == set()


def _definitions(*kinds: type[ast.AST]) -> Iterator[tuple[str, Any]]:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield module, node


def test_a_function_is_read_without_scrolling():
    """Its docstring and its arguments apart."""
    found = {}
    for module, node in _definitions(ast.FunctionDef):
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        found[f"{module}.{node.name}"] = node.end_lineno - first.lineno + 1
    assert {name: lines for name, lines in found.items() if lines > 45} == {}


def test_what_has_many_fields_is_made_by_name():
    """Five values in a row are five that can be exchanged."""
    ours = {node.name for _, node in _definitions(ast.ClassDef)}
    calls = [(module, node) for module, node in _definitions(ast.Call) if len(node.args) > 4]
    named = [
        (module, getattr(node.func, "id", getattr(node.func, "attr", None)), node.lineno)
        for module, node in calls
    ]
    assert [call for call in named if call[1] in ours | {"cls"}] == []
