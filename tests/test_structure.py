"""What may import what, and what files and functions look like: read off the source, nothing is
imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from imports import (
    MODULES,
    PAGE,
    imports,
    loaded_by,
    our_imports,
    package_of,
    page_with_table,
    parsed,
)

READERS = ("saved", "statistics", "fit", "figures", "report")
KNOW_LM_EVAL = ("harness", "check", "texts", "sweep", "samples", "cli", "demo")


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in READERS])
def test_readers_load_no_torch(module):
    assert not loaded_by(module) & {"torch", "transformers", "lm_eval", "transformer_lens"}


@pytest.mark.parametrize(
    ("library", "packages"),
    [
        ("lm_eval", KNOW_LM_EVAL),
        ("transformer_lens", ("residual",)),
    ],
)
def test_a_library_is_imported_in_its_packages_only(library, packages):
    importing = {name for name in MODULES if library in imports(name)}
    assert {name for name in importing if package_of(name) not in packages} == set()


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("numerics", set(map(package_of, MODULES)) - {"errors", "numerics"}),
        ("residual", {"jacobians", "measures", "measuring", "runs", "harness"}),
        ("jacobians", {"residual", "measures", "measuring", "runs", "harness"}),
        ("runs", {"harness", "vision", "texts", "samples", "training"}),
        ("vision", {"harness"}),
    ],
)
def test_a_package_never_imports(package, never):
    broken = {
        (name, other)
        for name in MODULES
        if package_of(name) == package
        for other in our_imports(name)
        if package_of(other) in never - {"lm_eval_coupling"}
    }
    assert broken == set()


def test_only_what_draws_loads_matplotlib():
    loading = {name for name in MODULES if "matplotlib" in imports(name, at_import_only=True)}
    assert set(map(package_of, loading)) <= {"figures", "coupling_analysis"}


def test_the_package_does_not_import_the_studies():
    users = {name for name in MODULES if name.startswith("lm_eval_coupling")}
    assert {
        name for name in users if "coupling_analysis" in map(package_of, imports(name))
    } == set()


def test_imports_of_every_package_are_those_of_the_docs():
    assert PAGE.read_text("utf-8") == page_with_table(), "run: python tests/support/imports.py"


def test_imports_form_no_circle():
    """Imports inside functions and for type checkers count."""
    graph = {name: our_imports(name) for name in MODULES}
    while free := [name for name, needed in graph.items() if not needed]:
        for name in free:
            del graph[name]
        for needed in graph.values():
            needed.difference_update(free)
    assert graph == {}


def test_a_file_is_one_idea():
    lines = {name: len(file.read_text("utf-8").splitlines()) for name, file in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def _nodes(kind: type[ast.AST]) -> Iterator[tuple[str, Any]]:
    for module, file in MODULES.items():
        for node in ast.walk(parsed(file)):
            if isinstance(node, kind):
                yield module, node


def test_a_function_is_read_without_scrolling():
    """Its docstring and its arguments do not count."""
    lengths = {}
    for module, node in _nodes(ast.FunctionDef):
        has_more = ast.get_docstring(node) and len(node.body) > 1
        first = node.body[1] if has_more else node.body[0]
        lengths[f"{module}.{node.name}"] = node.end_lineno - first.lineno + 1
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}


def test_classes_with_many_fields_are_made_by_name():
    """Five values in a row are five that can be exchanged."""
    ours = {node.name for _, node in _nodes(ast.ClassDef)} | {"cls"}
    calls = [(module, node) for module, node in _nodes(ast.Call) if len(node.args) > 4]
    named = [
        (module, getattr(node.func, "id", getattr(node.func, "attr", None)), node.lineno)
        for module, node in calls
    ]
    assert [call for call in named if call[1] in ours] == []
