"""What reads and draws loads neither torch nor lm-eval."""

import pkgutil
import subprocess
import sys

import lm_eval_coupling

PACKAGES = ("saved", "statistics", "fit", "figures", "report")
IMPORT = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    if heavy := {"torch", "lm_eval", "transformers"} & {*sys.modules}:
        sys.exit(f"{module} loads {heavy}")
"""


def test_no_torch_is_loaded():
    """Pictures and studies loaded torch for a square root."""
    (path,) = lm_eval_coupling.__path__
    found = [
        [f"lm_eval_coupling.{package}.{module.name}" for module in pkgutil.iter_modules([folder])]
        for package, folder in ((package, f"{path}/{package}") for package in PACKAGES)
    ]
    assert all(found)
    command = [sys.executable, "-c", IMPORT, *(name for names in found for name in names)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and ran.stderr.strip() == "", ran.stderr
