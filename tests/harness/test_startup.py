"""The start-up hook: what every interpreter pays for it, what it does on an import of lm-eval, what
it leaves alone.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_coupling import _startup
from lm_eval_coupling.harness import hooks

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "hook"
OPT_OUT = "LM_EVAL_COUPLING_NO_HOOK"
HOOKED = f"import site; site.addsitedir({str(HOOK)!r})\n"
"""What an interpreter does at its start with the files that the wheel puts into site-packages."""


def python(code, *path, options=(), **environment):
    """Run ``code`` in a fresh interpreter that sees only the standard library and ``path``."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in (OPT_OUT, "PYTHONDONTWRITEBYTECODE")
    }
    environment = inherited | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    command = [sys.executable, "-S", *options, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=HOOK, capture_output=True, text=True, check=False
    )


def quiet(found):
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout.split()


REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target
"""
MODELS = """
from lm_eval.api.registry import model_registry
before = list(model_registry)
"""


@pytest.fixture
def lm_eval(tmp_path):
    """A stand-in for lm-eval: the modules that the hook waits for, and a registry of models."""

    def write(models="", registry=REGISTRY):
        package = tmp_path / "lm_eval"
        for name, text in {
            "__init__": "",
            "models/__init__": MODELS + models,
            "api/__init__": "",
            "api/registry": registry + "\nmodel_registry = Registry()\n",
        }.items():
            file = package / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def test_a_start_loads_the_hook_and_nothing_else(tmp_path):
    (tmp_path / "other.pth").write_text("import os\n")
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); before = set(sys.modules)\n{HOOKED}"
    )
    loaded = quiet(python(code + "print(*sorted(set(sys.modules) - before))", ROOT))
    assert loaded == ["lm_eval_coupling", "lm_eval_coupling._startup"]


def test_a_start_costs_little_beside_that_of_python(tmp_path):
    """All that importing the hook imports, over the `site` that every start imports, with
    byte-code; a third is usual.
    """

    def share():
        found = python(
            HOOKED, ROOT, options=["-X", "importtime"], PYTHONPYCACHEPREFIX=str(tmp_path)
        )
        times = {
            name: int(us)
            for us, name in re.findall(r"\| +(\d+) \| +(\S+)$", found.stderr, re.MULTILINE)
        }
        return times["lm_eval_coupling._startup"] / times["site"]

    share()  # writes the byte-code
    assert 0 < min(share() for _ in range(10)) < 1 / 2


def test_lm_eval_learns_of_the_model_once_its_own_are_there(lm_eval):
    """Registering earlier would make upstream's registration of its own models skip itself."""
    code = HOOKED + "import lm_eval.models as m; print(m.before, dict(m.model_registry))"
    assert (
        " ".join(quiet(python(code, ROOT, lm_eval()))) == f"[] {{'coupling-hf': '{hooks.TARGET}'}}"
    )


def test_without_the_hook_lm_eval_learns_nothing(lm_eval):
    """The control of the test above."""
    assert quiet(
        python("import lm_eval.models as m; print(dict(m.model_registry))", ROOT, lm_eval())
    ) == ["{}"]


STARTS = [HOOKED, "import lm_eval_coupling._startup as s; s.install()\n"]


@pytest.mark.parametrize("start", STARTS, ids=["pth", "start"])
def test_the_opt_out_variable(lm_eval, start):
    code = start + "import sys, lm_eval.models as m\n"
    code += "hooked = any('lm_eval_coupling' in repr(finder) for finder in sys.meta_path)\n"
    code += "print(len(m.model_registry), hooked)"
    assert quiet(python(code, ROOT, lm_eval())) == ["1", "True"]
    assert quiet(python(code, ROOT, lm_eval(), **{OPT_OUT: "1"})) == ["0", "False"]


def test_an_opt_out_of_zero_leaves_the_hook_on(lm_eval):
    code = HOOKED + "import lm_eval.models as m; print(len(m.model_registry))"
    assert quiet(python(code, ROOT, lm_eval(), **{OPT_OUT: "0"})) == ["1"]


def test_an_exit_while_the_hook_is_loaded_does_not_end_the_interpreter(tmp_path):
    package = tmp_path / "lm_eval_coupling"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(3)")
    assert quiet(python(HOOKED + "print('started')", tmp_path)) == ["started"]


def test_modules_of_a_zip_archive_that_the_plugin_does_not_know_are_left_alone(lm_eval, tmp_path):
    """All modules of an archive share one loader, which kept our wrapper for later modules."""
    folder = lm_eval()
    (tmp_path / "lm_eval" / "later.py").write_text("x = 1")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "lm_eval")
    assert folder
    code = HOOKED + "import lm_eval_coupling.harness.hooks as p; seen = []\n"
    code += "p.after_import = lambda module: seen.append(module.__name__)\n"
    code += "import lm_eval.models, lm_eval.later; print(*seen)"
    assert quiet(python(code, ROOT, archive)) == ["lm_eval.models"]


def test_one_hook_however_often_it_is_installed():
    code = (
        HOOKED * 2
        + "import sys, lm_eval_coupling._startup as s; s.install(); s.install(forced=True)\n"
    )
    assert quiet(
        python(code + "print(sum(isinstance(f, s._Finder) for f in sys.meta_path))", ROOT)
    ) == ["1"]


def test_two_such_hooks_do_not_ask_each_other_for_ever(lm_eval):
    code = (
        HOOKED
        + "import sys, lm_eval_coupling._startup as s; sys.meta_path.insert(0, s._Finder())\n"
    )
    code += "import lm_eval.models as m; print(*m.model_registry)"
    assert quiet(python(code, ROOT, lm_eval())) == ["coupling-hf"]


def test_a_broken_lm_eval_breaks_neither_the_start_nor_its_own_message(lm_eval):
    path = lm_eval(models="raise RuntimeError('broken upstream')")
    assert quiet(python(HOOKED, ROOT, path)) == []
    with_hook, without = (
        python(f"{start}import lm_eval.models", ROOT, path) for start in (HOOKED, "")
    )
    assert with_hook.returncode == without.returncode == 1
    assert (
        with_hook.stderr.splitlines()[-1]
        == without.stderr.splitlines()[-1]
        == "RuntimeError: broken upstream"
    )
    assert "_coupling" not in with_hook.stderr.splitlines()[-2]


def test_an_lm_eval_that_does_not_fit_is_a_warning(lm_eval):
    path = lm_eval(
        registry="class Registry(dict): pass  # without the method that the plugin calls"
    )
    found = python(HOOKED + "import lm_eval.models; print('imported')", ROOT, path)
    assert (found.returncode, found.stdout) == (0, "imported\n")
    assert found.stderr.startswith("lm-eval-coupling does not fit this lm-eval (lm_eval.models")
    assert found.stderr.count("\n") == 1


def test_without_lm_eval_an_import_fails_as_usual():
    found = python(HOOKED + "import lm_eval.models", ROOT)
    assert (
        found.stderr.endswith("ModuleNotFoundError: No module named 'lm_eval'\n")
        and "Error" in found.stderr
    )


def test_a_removed_package_is_silent():
    code = HOOKED + "from importlib.util import find_spec; print(find_spec('lm_eval_coupling'))"
    assert quiet(python(code)) == ["None"]


def test_a_half_removed_package_is_silent(tmp_path, lm_eval):
    package = tmp_path / "lm_eval_coupling"
    package.mkdir()
    for name in ("__init__.py", "_startup.py"):
        (package / name).write_bytes((ROOT / "lm_eval_coupling" / name).read_bytes())
    code = HOOKED + "import lm_eval.models as m; print(len(m.model_registry))"
    assert quiet(python(code, lm_eval())) == ["0"]


def test_the_finder_answers_for_the_modules_that_the_plugin_knows():
    assert _startup.MODULES == set(hooks.STEPS)
    assert (
        _startup._Finder().find_spec("json") is None
        and _startup._Finder().find_spec("lm_eval") is None
    )


def test_the_files_are_what_site_reads():
    """A line of a .pth is executed if it begins with import; a .start file (PEP 829) names a
    function.
    """
    (line,) = (HOOK / "lm_eval_coupling_hook.pth").read_text().splitlines()
    assert line.startswith("import ") and OPT_OUT in line
    (entry,) = (HOOK / "lm_eval_coupling_hook.start").read_text().splitlines()
    module, _, function = entry.partition(":")
    assert getattr(importlib.import_module(module), function) is _startup.install
