"""lm-eval's own code with a few of its tasks: the index of all of them takes ten seconds."""

import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

TASKS = ("arc", "gsm8k", "hellaswag", "mmlu/default", "truthfulqa", "winogrande")


def save_lean_lm_eval(folder: Path, package: Path | None = None) -> str:
    """Link ``package`` into ``folder``, with `TASKS` alone, and return the folder's path.

    Args:
        folder: created where it does not exist.
        package: folder of lm-eval's package; that of this interpreter by default.
    """
    if package is None:
        package = Path(importlib.util.find_spec("lm_eval").origin).parent
    tasks = folder / "lm_eval" / "tasks"
    tasks.mkdir(parents=True)
    for file in (*package.iterdir(), *(package / "tasks").glob("*.py")):
        if file != package / "tasks":
            (folder / "lm_eval" / file.relative_to(package)).symlink_to(file)
    for name in TASKS:
        # The index does not follow links of folders.
        shutil.copytree(package / "tasks" / name, tasks / name, copy_function=os.symlink)
    return str(folder)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lean-")


@functools.cache
def lean_lm_eval() -> str:
    """Return the folder of one lean lm-eval, kept until this process ends."""
    return save_lean_lm_eval(Path(_temporary_folder().name))
