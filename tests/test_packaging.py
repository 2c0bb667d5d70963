"""The package as it reaches a user: what the wheel holds, what lm-eval finds of it, and that
removal leaves nothing.
"""

import email
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from forked import forked_python
from lean_lm_eval import lean_lm_eval

from lm_eval_coupling.harness import plugin

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "lm_eval_coupling"
OPT_OUT = "LM_EVAL_COUPLING_NO_HOOK"
HOOK = {"lm_eval_coupling_hook.pth", "lm_eval_coupling_hook.start"}

pytestmark = pytest.mark.slow


def run(*command, **environment):
    """What the command prints, which must succeed; it sees neither the checkout nor the settings of
    the tests.
    """
    hidden = (OPT_OUT, "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    environment = (
        inherited | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    )
    command = [*map(str, command)]
    found = subprocess.run(
        command, env=environment, cwd=ROOT / "hook", capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"{' '.join(command)}\n{found.stdout}\n{found.stderr}"
    return found.stdout


def pip(*words, python=sys.executable):
    return run(sys.executable, "-m", "pip", "--python", python, *words)


ISOLATION = ["--no-build-isolation"] if find_spec("hatchling") else []
"""Where the build backend is missing, pip fetches it."""


def sources(folder):
    """Name and content of the files below a folder, without byte-code."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def contents(wheel):
    """Name and content of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build(source, folder):
    pip("wheel", "--no-deps", *ISOLATION, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


class Environment:
    """A virtual environment whose packages, except ours, are those of the running one."""

    def __init__(self, folder):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.scripts = self.python.parent
        self.packages = Path(
            self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        # Lines of a .pth come last on the path and the .pth files in the folders they name are not
        # read.
        borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        borrowed = [lean_lm_eval(), *borrowed]
        (self.packages / "borrowed.pth").write_text("\n".join(borrowed))
        self.empty = self.files()

    def files(self):
        """Everything installed, byte-code and folders too."""
        return {path for folder in (self.packages, self.scripts) for path in folder.rglob("*")}

    def run(self, code, *words, **environment):
        return run(self.python, "-c", code, *words, **environment)

    def install(self, *words):
        pip("install", "--no-deps", "--ignore-installed", *ISOLATION, *words, python=self.python)

    def uninstall(self):
        (self.packages / "borrowed.pth").unlink()  # nothing outside can be meant
        pip("uninstall", "--yes", "lm-eval-coupling", python=self.python)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.install("--editable", ROOT)
    return environment


def test_the_wheel_holds_the_package_the_tasks_and_the_hook(wheel):
    package = {f"lm_eval_coupling/{name}": content for name, content in sources(SOURCES).items()}
    tasks = {
        f"lm_eval_coupling/_tasks/{name}": content
        for name, content in sources(ROOT / "tasks").items()
    }
    studies = {
        f"coupling_analysis/{name}": content
        for name, content in sources(ROOT / "analysis" / "coupling_analysis").items()
    }
    expected = package | tasks | studies | sources(ROOT / "hook")
    assert {
        "lm_eval_coupling/_startup.py",
        "lm_eval_coupling/_tasks/arc.yaml",
    } | HOOK <= expected.keys()
    found = contents(wheel)
    about = {Path(name).name: found.pop(name) for name in [*found] if ".dist-info/" in name}
    assert found.keys() == expected.keys() and found == expected
    assert sum(map(len, found.values())) < 2_000_000
    metadata = email.message_from_bytes(about["METADATA"])
    assert metadata[
        "Name"
    ] == "lm-eval-coupling" and "lm-eval[hf]<0.5,>=0.4.13" in metadata.get_all("Requires-Dist")


def test_a_source_archive_makes_the_same_wheel(wheel, tmp_path):
    hatchling_build = pytest.importorskip(
        "hatchling.build", reason="the build backend is not installed"
    )
    code = f"import os; os.chdir({str(ROOT)!r}); import {hatchling_build.__name__} as b; "
    code += f"b.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert contents(build(archive, tmp_path)) == contents(wheel)


REGISTERED = """
import lm_eval.models, lm_eval_coupling, sys
from lm_eval.api.registry import model_registry
from lm_eval_coupling.harness.plugin import tasks_folder
print("coupling-hf" in model_registry, "torch" in sys.modules)
print(lm_eval_coupling.__path__[0])
print(tasks_folder())
"""


def test_an_installation_is_found_by_lm_eval(installed):
    registered, package, tasks = installed.run(REGISTERED).splitlines()
    assert registered == "True False"
    assert Path(package) == installed.packages / "lm_eval_coupling"
    assert Path(tasks) == Path(package) / "_tasks" and (Path(tasks) / "arc.yaml").is_file()


def test_an_editable_installation_is_found_by_lm_eval_and_is_the_checkout(editable):
    registered, package, tasks = editable.run(REGISTERED).splitlines()
    assert registered == "True False"
    assert Path(package) == SOURCES and Path(tasks) == ROOT / "tasks"
    assert not (editable.packages / "lm_eval_coupling").exists()


def test_the_opt_out_variable(installed):
    assert installed.run(REGISTERED, **{OPT_OUT: "1"}).splitlines()[0] == "False False"


ENTRY_POINT = """
from importlib.metadata import entry_points
(entry,) = entry_points(group="lm_eval.models", name="coupling-hf")
print(entry.value, entry.dist.locate_file(""))
"""


def test_the_entry_point_is_the_model_that_the_hook_registers(installed):
    value, folder = installed.run(ENTRY_POINT).split()
    assert value == plugin.TARGET and Path(folder) == installed.packages


def test_the_command_is_there(installed):
    assert "demo" in run(next(installed.scripts.glob("lm-eval-coupling*")), "--help")


def evaluation_of_a_tiny_model(folder, task):
    """Arguments of lm-eval that measure a tiny model on a task in ``folder``."""
    model = tiny.save_model(folder / "model", num_hidden_layers=2)
    options = f"coupling_ranks=4+8,coupling_limit=2,coupling_store={folder / 'store.sqlite'}"
    return [
        "--model",
        "coupling-hf",
        "--model_args",
        f"pretrained={model},{options}",
        "--tasks",
        task,
        "--include_path",
        folder / "tasks",
        "--output_path",
        folder / "out",
        "--device",
        "cpu",
    ]


def test_lm_evals_own_command_measures(installed, tmp_path):
    task = tiny.save_task(tmp_path / "tasks", "choice")
    words = evaluation_of_a_tiny_model(tmp_path, task)
    printed = run(installed.python, "-m", "lm_eval", *words)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"][task]
    assert 0 < scores["coupling,none"] < 1 and f"{scores['coupling,none']:.4f}" in printed
    assert [*results.parent.glob(f"coupling_{task}_*.parquet")]


def test_a_folder_on_the_path_is_enough_for_the_command(wheel, tmp_path):
    """`pip install --target` runs no .pth file: lm-eval's own command knows of no such model there,
    ours does.
    """
    folder, task = tmp_path / "packages", tiny.save_task(tmp_path / "tasks", "choice")
    pip("install", "--quiet", "--no-compile", "--no-deps", "--target", folder, wheel)
    words = evaluation_of_a_tiny_model(tmp_path, task)
    path = os.pathsep.join([str(folder), lean_lm_eval()])
    printed = run(forked_python(), "-m", "lm_eval_coupling", "run", *words, PYTHONPATH=path)
    assert "Coupling at K = 4" in printed and [
        *(tmp_path / "out").rglob(f"coupling_{task}_*.parquet")
    ]


@pytest.mark.parametrize("words", [[], ["--editable"]], ids=["wheel", "editable"])
def test_removal_leaves_nothing(wheel, tmp_path, words):
    environment = Environment(tmp_path)
    environment.install(*words, ROOT if words else wheel)
    environment.run("import lm_eval.models")
    hook = {environment.packages / name for name in HOOK}
    assert hook < environment.files() - environment.empty
    environment.uninstall()
    assert environment.files() == environment.empty - {environment.packages / "borrowed.pth"}
    assert environment.run("import sys; print('lm_eval_coupling' in sys.modules)") == "False\n"
