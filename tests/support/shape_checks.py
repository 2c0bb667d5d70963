"""Checks of shapes at run time, put on functions of the package as it is imported.

jaxtyping's own import hook wraps every function, which doubles the time of an evaluation of a tiny
model. Here it wraps those alone whose annotations name an array; mypy holds all other types. What
has passed once passes again: only types, shapes and dtypes decide.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import sys

import numpy as np
import torch
from beartype import beartype
from jaxtyping import jaxtyped

ARRAYS = {"Bool", "Float", "Int", "UInt8"}  # jaxtyping's names that the package imports
CHECK = "shape_checks.checked"


def check_shapes_in(*packages: str) -> None:
    """Check the arrays of calls into modules of ``packages`` that are imported from now on."""
    loaded = sorted(package for package in packages if package in sys.modules)
    if loaded:
        raise RuntimeError(
            f"expected packages not imported yet, got {', '.join(loaded)}; "
            "set LM_EVAL_COUPLING_NO_HOOK=1, which keeps the start-up hook from importing them"
        )
    sys.meta_path.insert(0, _Finder(packages))


def checked(target):
    """Check arguments and result of a function, or the arguments that make a dataclass."""
    if not isinstance(target, type):
        return _checked_function(target)
    if dataclasses.is_dataclass(target):
        target.__init__ = _checked_function(target.__init__)
    return target


def _checked_function(function):
    check, passed, results = jaxtyped(typechecker=beartype), {}, []
    call_and_check = check(function)

    @check
    @functools.wraps(function)
    def check_result(*args, **kwargs):
        return results.pop()

    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        kinds = _kinds((args, kwargs))
        if kinds not in passed:
            result = call_and_check(*args, **kwargs)
            passed[kinds] = {_kinds(result)}
            return result
        result = function(*args, **kwargs)
        if (kind := _kinds(result)) not in passed[kinds]:
            results.append(result)
            check_result(*args, **kwargs)
            passed[kinds].add(kind)
        return result

    return call


def _kinds(value):
    """Return all of a value that an annotation can name."""
    # Tuples of types, because a union of types is made anew at every call.
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_kinds, value))
    if isinstance(value, dict):
        return type(value), tuple((type(key), _kinds(part)) for key, part in value.items())
    return value if isinstance(value, (str, bool)) else type(value)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path)
        if b"from jaxtyping import" not in source:
            return super().get_code(fullname)
        # Not from the bytecode cache, which holds the code without checks.
        tree = _Decorator().visit(ast.parse(source, self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Decorator(ast.NodeTransformer):
    def visit_Module(self, node):
        self.generic_visit(node)
        first = next(i for i, part in enumerate([*node.body, None]) if not _stays_first(part))
        node.body[first:first] = ast.parse("import shape_checks").body
        return node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if _names_an_array(_annotations(node)):
            node.decorator_list.append(_check())  # next to the function, which has the annotations
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
        if _names_an_array(fields):
            node.decorator_list.insert(0, _check())  # once dataclass has made its __init__
        return node


def _stays_first(node) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def _check() -> ast.expr:
    return ast.parse(CHECK, mode="eval").body


def _annotations(function):
    arguments = function.args
    parts = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parts += filter(None, [arguments.vararg, arguments.kwarg])
    return [part.annotation for part in parts] + [function.returns]


def _names_an_array(annotations) -> bool:
    return any(
        isinstance(part, ast.Name) and part.id in ARRAYS
        for annotation in annotations
        if annotation is not None
        for part in ast.walk(annotation)
    )
