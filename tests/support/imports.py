"""Imports of the package, read off its sources: nothing is imported.

python tests/support/imports.py   # write the table of packages in docs/architecture.md anew
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"lm_eval_coupling": ROOT, "coupling_analysis": ROOT / "analysis"}
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- packages: generated -->", "<!-- packages: end -->"


def _modules() -> dict[str, Path]:
    """Map the dotted name of every module to its file."""
    modules = {}
    for package, folder in FOLDERS.items():
        for file in sorted((folder / package).rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES = _modules()


def package_of(module: str) -> str:
    """Return the part of the project that a module belongs to: its folder, or itself at the top."""
    return module.split(".")[1] if module.startswith("lm_eval_coupling.") else module.split(".")[0]


@cache
def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file, made once for all tests; it must not be changed."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(module: str, *, at_import_only: bool = False) -> frozenset[str]:
    """List what a module imports: our modules in full, others by their top-level name.

    Args:
        module: dotted name.
        at_import_only: leave out imports inside functions and those for type checkers.
    """
    tree = parsed(MODULES[module])
    names = set()
    for node in _run_at_import(tree.body) if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return frozenset(name if name in MODULES else name.split(".")[0] for name in names)


def _run_at_import(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the statements that run on import."""
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _run_at_import([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _run_at_import([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef):
            yield from _run_at_import(node.body)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def our_imports(module: str) -> set[str]:
    """List the modules of ours that a module imports, wherever in its text."""
    return {name for name in imports(module) if name in MODULES} - {module}


def loaded_by(module: str) -> set[str]:
    """List what importing a module loads, others' modules by their top-level name."""
    loaded, waiting = set(), [module]
    while waiting:
        for name in imports(waiting.pop(), at_import_only=True) - loaded:
            loaded.add(name)
            if name in MODULES:
                package = name.rpartition(".")[0]
                waiting += [name, *([package] if package in MODULES else [])]
    return loaded


def package_table() -> str:
    """Return the Markdown table of packages: what each is, and what it imports of the others."""
    lines = ["| package | contents | imports |", "| --- | --- | --- |"]
    packages = dict.fromkeys(map(package_of, MODULES))
    for package in sorted(packages, key=str.lower):
        if package in ("lm_eval_coupling", "__main__"):
            continue
        members = [name for name in MODULES if package_of(name) == package]
        others = {package_of(name) for member in members for name in our_imports(member)}
        named = ", ".join(f"`{name}`" for name in sorted(others - {package, "lm_eval_coupling"}))
        first = ast.get_docstring(ast.parse(MODULES[members[0]].read_text("utf-8"))) or ""
        lines.append(f"| `{package}` | {_first_sentence(first)} | {named or 'nothing of ours'} |")
    return "\n".join(lines)


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".").replace("|", "\\|") + "."


def page_with_table() -> str:
    """Return docs/architecture.md with its table as the imports are now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n{package_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(), encoding="utf-8")
