"""Language that a machine can check: openings of docstrings, names, width, cross-references."""

import ast
import collections
import importlib
import re

import pytest
from imports import FOLDERS, MODULES, parsed

# Words with which a docstring asks a riddle in place of naming an action or a thing.
OPENERS = set(
    "What Whether Of Those That As From This These Where Which Who Whose How Why When In With "
    "Without For Under Beside By To At Only One All Also Is Are Has Have And Or But If Every Each "
    "Any Some Nothing Everything None Both Either Neither Its Their It They Here There Then So "
    "Such Like Than".split()
)
ARTICLES = {"A", "An", "The"}
EMPTY_NAMES = set(
    "found told said one these whole like here those now of_block everything something asked "
    "known wanted".split()
)
REFERENCE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")


def documented():
    """Every module, class and function with a docstring: module, enclosing classes, node, text."""

    def walk(name, node, classes, is_inside):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield name, classes, node, text, is_inside
        for child in ast.iter_child_nodes(node):
            inner = [*classes, node.name] if isinstance(node, ast.ClassDef) else classes
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(name, child, inner, is_inside or is_function)

    for name, file in MODULES.items():
        yield from walk(name, parsed(file), [], False)


def is_riddle(node, text):
    """Whether a docstring opens with neither a verb nor a noun phrase."""
    first = re.split(r"[\s,.:;]", text.strip(), maxsplit=1)[0].strip("`*")
    decorators = {ast.unparse(d).split(".")[-1] for d in getattr(node, "decorator_list", [])}
    is_function = isinstance(node, ast.FunctionDef) and not decorators & {
        "property",
        "cached_property",
    }
    return first in OPENERS or (is_function and first in ARTICLES)


def test_public_docstrings_open_with_an_action_or_a_thing():
    public = [
        (name, node, text)
        for name, _, node, text, is_inside in documented()
        if not isinstance(node, ast.Module) and not node.name.startswith("_") and not is_inside
    ]
    riddles = [
        f"{name}.{node.name}: {text.splitlines()[0]}"
        for name, node, text in public
        if is_riddle(node, text)
    ]
    assert len(riddles) <= 0.02 * len(public), "\n".join(riddles)


def test_names_say_what_they_hold():
    empty = []
    for name, file in MODULES.items():
        for node in ast.walk(parsed(file)):
            word = node.arg if isinstance(node, ast.arg) else None
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                word = node.id
            if word and word.strip("_") in EMPTY_NAMES:
                empty.append(f"{name}:{node.lineno}: {word}")
    assert len(empty) <= 20, "\n".join(empty)


def test_lines_are_a_hundred_characters_at_most():
    wide = [
        f"{name}:{number}"
        for name, file in MODULES.items()
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide, "\n".join(wide)


def test_module_names_are_unique():
    names = collections.Counter(
        name.split(".")[-1] for name in MODULES if "." in name and not name.endswith("__main__")
    )
    packages = {
        name.split(".")[-1]
        for name in MODULES
        if any(other.startswith(f"{name}.") for other in MODULES)
    }
    twice = [name for name, count in names.items() if count > 1 and name not in packages]
    assert len(twice) <= 3, twice


@pytest.mark.parametrize("package", FOLDERS)
def test_cross_references_resolve(package):
    broken = []
    for name, classes, node, text, _ in documented():
        if name.split(".")[0] == package:
            own = [*classes, node.name] if isinstance(node, ast.ClassDef) else classes
            broken += [
                f"{name}: {reference}"
                for reference in REFERENCE.findall(text)
                if not resolves(reference.removesuffix("()"), name, own)
            ]
    assert not broken, "\n".join(broken)


def resolves(reference, module, classes):
    """Whether a reference names a module, or something that is found from where it stands."""
    parts = reference.strip(".").split(".")
    if reference.startswith("."):  # as Sphinx reads it: the end of any full name
        return any(
            f".{name}".endswith("." + ".".join(parts[:end]))
            and has(importlib.import_module(name), parts[end:])
            for end in range(len(parts), 0, -1)
            for name in MODULES
        )
    for end in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        if has(target, parts[end:]):
            return True
    scope = importlib.import_module(module)
    is_there = any(has(scope, [*classes[:depth], *parts]) for depth in range(len(classes) + 1))
    return is_there or parts[0] in imported_for_types(module)


def imported_for_types(module):
    """Names that a module imports anywhere, also for type checkers alone."""
    return {
        alias.asname or alias.name
        for node in ast.walk(parsed(MODULES[module]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def has(target, parts):
    for part in parts:
        fields = {**getattr(target, "__annotations__", {}), **getattr(target, "__dict__", {})}
        if not hasattr(target, part):
            return part in fields
        target = getattr(target, part)
    return True
