"""What reads and draws loads neither torch nor lm-eval."""

import pkgutil
import subprocess
import sys

import pytest

import lm_eval_coupling


@pytest.mark.parametrize("package", ["saved", "statistics", "fit", "figures", "report"])
def test_no_torch_is_loaded(package):
    """Pictures and studies loaded torch for a square root."""
    (path,) = lm_eval_coupling.__path__
    modules = [
        f"lm_eval_coupling.{package}.{module.name}"
        for module in pkgutil.iter_modules([f"{path}/{package}"])
    ]
    assert modules
    heavy = "{'torch', 'lm_eval', 'transformers'}"
    code = f"import sys, {', '.join(modules)}; sys.exit(str({heavy} & {{*sys.modules}} or ''))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == "", ran.stderr
