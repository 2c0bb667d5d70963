"""Functions of a task, in a module of their own, as lm-eval loads them from a task's folder."""

import importlib.util
from pathlib import Path
from types import ModuleType

SOURCE = """
def one(doc):
    return doc["a"]

def other(doc):
    return doc["b"]

def made(label):
    def answer(doc):
        return label
    return answer
"""


def sources(folder: Path) -> ModuleType:
    """Write the functions into a new ``folder`` and load them."""
    folder.mkdir()
    (folder / "utils.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(f"utils_{folder.name}", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
