"""Names inside lm-eval and TransformerLens: each is where we expect it, and in one file of ours."""

import ast
import functools
import importlib
import inspect
import logging
import re
import types
from importlib.metadata import version
from pathlib import Path

import pytest
from imports import parsed

from lm_eval_coupling.harness import hooks
from lm_eval_coupling.harness import lm_eval_internals as internals
from lm_eval_coupling.residual import bridge

ROOT = Path(__file__).parents[1] / "lm_eval_coupling"
OURS = {
    "lm_eval": ROOT / "harness" / "lm_eval_internals.py",
    "transformer_lens": ROOT / "residual" / "bridge.py",
}
LISTED = [
    pytest.param(module, path, without, id=f"{module}.{path}")
    for names in (internals.WRAPPED, internals.USED, bridge.INTERNALS)
    for module, paths in names.items()
    for path, without in paths.items()
]


@pytest.mark.parametrize(("module", "path", "without"), LISTED)
def test_every_name_is_where_we_expect_it(module, path, without):
    """An argument in parentheses is one of the class, which keeps it under the same name."""
    library = {"lm_eval": "lm-eval", "transformer_lens": "transformer-lens"}[module.split(".")[0]]
    moved = f"{library} {version(library)} has no {path} in {module}: {without}"
    try:
        owner, argument = path.rstrip(")").partition("(")[::2]
        value = functools.reduce(getattr, owner.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        pytest.fail(moved)
    if argument and argument not in inspect.signature(value.__init__).parameters:
        pytest.fail(moved)


def test_a_listed_name_that_moved_is_a_warning_with_its_consequence(caplog):
    """Every step of the hook takes an empty module, and says what is lost without each name."""
    assert set(hooks.STEPS) == {*internals.WRAPPED, "lm_eval.models"}
    for name, paths in internals.WRAPPED.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
            hooks.after_import(types.SimpleNamespace(__name__=name))
        assert [record.getMessage() for record in caplog.records] == [
            f"lm-eval-coupling: this lm-eval has no {path}; {without}"
            for path, without in paths.items()
        ]


def test_the_other_function_of_a_module_is_wrapped_all_the_same(caplog):
    module = types.SimpleNamespace(
        __name__="lm_eval.evaluator", evaluate=lambda lm, task_dict: {"scores": 1}
    )
    hooks.after_import(module)
    assert "no simple_evaluate" in caplog.text and module.evaluate._of_coupling


def test_a_model_class_without_that_step_is_left_alone():
    internals.wrap_reading_of_config(lm := types.SimpleNamespace(), lambda read: pytest.fail())
    assert vars(lm) == {}


def trees(library):
    """Syntax trees of our modules, except the one that may name internals of ``library``."""
    return {file: parsed(file) for file in ROOT.rglob("*.py") if file != OURS[library]}


def is_private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names_of_lm_eval():
    """Private functions, methods and attributes in the sources that our classes build on."""
    folder = Path(importlib.import_module("lm_eval").__file__).parent
    files = [folder / "models" / "huggingface.py", *folder.glob("*.py")]
    files += [file for part in ("api", "config", "loggers", "_cli") for file in
              (folder / part).glob("*.py")]  # fmt: skip
    files.append(folder / "tasks" / "manager.py")
    return {name for file in files for name in _defined(ast.parse(file.read_text("utf-8")))}


def _defined(tree):
    """Private names that a module defines: functions, and attributes that are assigned."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        if name and is_private(name):
            yield name


@pytest.mark.parametrize("library", OURS)
def test_no_other_module_imports_a_private_name(library):
    reached = {
        (file.name, name)
        for file, tree in trees(library).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        for name in [f"{getattr(node, 'module', '') or ''}.{alias.name}".strip(".")]
        if name.split(".")[0] == library and is_private(name)
    }
    assert reached == set()


def test_no_other_module_uses_a_private_attribute_of_lm_eval():
    upstream = private_names_of_lm_eval()
    assert {"_encode_pair", "_get_config", "_rank", "_configure"} <= upstream
    reached = set()
    for file, tree in trees("lm_eval").items():
        text = file.read_text("utf-8")
        if not (file.parent.name == "harness" or re.search(r"\b(import|from) lm_eval\b", text)):
            continue
        own = set(_defined(tree))
        reached |= {
            (file.name, node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in upstream - own
        }
    assert reached == set()


def test_no_other_module_replaces_anything_in_lm_eval():
    """Neither by assignment nor by setattr, on a name that was imported from lm-eval."""
    reached = set()
    for file, tree in trees("lm_eval").items():
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and (getattr(node, "module", None) or node.names[0].name).split(".")[0] == "lm_eval"
            for alias in node.names
        }
        targets = [
            target
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AugAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Attribute)
        ]
        targets += [
            node.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr"
        ]
        for target in targets:
            while isinstance(target, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Name) and target.id in imported:
                reached.add((file.name, ast.unparse(target)))
    assert reached == set()


def test_no_other_module_names_an_internal_of_transformer_lens():
    names = {
        re.split(r"[.(]", path.rstrip(")"))[-1]
        for paths in bridge.INTERNALS.values()
        for path in paths
    } - {"forward", "TransformerBridge"}
    assert "original_component" in names
    reached = set()
    for file, tree in trees("transformer_lens").items():
        for node in ast.walk(tree):
            word = getattr(node, "attr", getattr(node, "value", None))
            if isinstance(word, str) and word in names:
                reached.add((file.name, word))
    assert reached == set()
