"""The plugin's switch: makes this package known to lm-eval in the running interpreter."""

from __future__ import annotations

import sys

from lm_eval_coupling import _startup
from lm_eval_coupling.harness.hooks import (
    MODEL,
    STEPS,
    TARGET,
    after_import,
    serve_running_command,
    tasks_folder,
)

__all__ = ["MODEL", "TARGET", "install", "tasks_folder"]


def install() -> None:
    """Change the modules of lm-eval that are loaded, and through the hook those that will be."""
    _startup.install(forced=True)
    for name in STEPS:
        if name in sys.modules:
            after_import(sys.modules[name])
    serve_running_command()
