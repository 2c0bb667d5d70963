"""lm-eval's releases, this one and the next, with the start-up hook and without."""

import json
import os
import subprocess
import sys

import pytest
from evaluations import HOOK, command, evaluation, run, run_python, written
from lean_lm_eval import lean_lm_eval, save_lean_lm_eval

from lm_eval_coupling import load_records

pytestmark = pytest.mark.slow
NEXT = "lm-eval==0.5.0.dev1"


@pytest.fixture(scope="module")
def next_release(tmp_path_factory):
    """A path to the pre-release; everything it needs is there with the present one."""
    folder, lean = tmp_path_factory.mktemp("next"), tmp_path_factory.mktemp("lean")
    words = "install --quiet --no-compile --pre --no-deps --target".split()
    found = subprocess.run(
        [sys.executable, "-m", "pip", *words, str(folder), NEXT],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        pytest.skip(f"no {NEXT} from the package index: {found.stderr.strip().splitlines()[-1]}")
    # The folder itself has the version, beside the package.
    return [save_lean_lm_eval(lean, folder / "lm_eval"), str(folder)]


@pytest.fixture(params=["present", "next"])
def release(request, monkeypatch):
    """Fresh interpreters find this lm-eval.

    test_results.py and test_processes.py try the present one's command and several processes.
    """
    path = [lean_lm_eval()]
    if request.param == "next":
        path = request.getfixturevalue("next_release")
    path = os.pathsep.join([*path, str(HOOK.parent)])
    monkeypatch.setattr("evaluations.ENVIRONMENT", {"PYTHONPATH": path})
    return request.param


only_next = pytest.mark.parametrize("release", ["next"], indirect=True)


# As lm-eval loads an entry point: at the first look-up of the name, with nothing of ours before.
DISCOVERY = """
import sys
from lm_eval.api.registry import model_registry

assert not [name for name in sys.modules if name.startswith("lm_eval_coupling")]
find = type(model_registry).get
def get(self, name, *rest):
    if name == "coupling-hf":
        import lm_eval_coupling.harness.lm
    return find(self, name, *rest)
type(model_registry).get = get
"""
AS_AN_ENTRY_POINT = f"""{DISCOVERY}
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

home, out = sys.argv[1:]
tracker = EvaluationTracker(output_path=out)
arguments = dict(coupling_ranks="2", coupling_limit=2, coupling_store=out + "/s")
results = simple_evaluate(
    "coupling-hf",
    model_args=dict(pretrained=home + "/float32", **arguments),
    tasks=["tiny_choice"],
    device="cpu",
    bootstrap_iters=0,
    evaluation_tracker=tracker,
    task_manager=TaskManager(include_path=home + "/tasks", include_defaults=False),
)
tracker.save_results_aggregated(results, results.pop("samples"))
"""
COMMAND = f"""{DISCOVERY}
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def without_hook(code, folder, *words):
    """Run a program in an interpreter in which no hook is installed."""
    script = folder / "run.py"
    script.write_text(code)
    return run_python([script, *words], LM_EVAL_COUPLING_NO_HOOK="1")


def test_the_class_needs_no_hook(release, home, tmp_path):
    """Found through its entry point alone it scored, ended well and recorded nothing."""
    found = without_hook(AS_AN_ENTRY_POINT, tmp_path, home, tmp_path / "out")
    assert found.returncode == 0, found.stderr[-3000:]
    assert 0 < written(tmp_path / "out")["results"]["tiny_choice"]["coupling,none"] < 1
    assert len(load_records(tmp_path / "out")) == 2


def command_without_hook(home, folder, settings):
    words = ["--tasks", "tiny_choice", "--include_path", home / "tasks", "--device", "cpu"]
    words += ["--output_path", folder / "out", "--log_samples", "--model", "coupling-hf"]
    given = f"pretrained={home / 'float32'},coupling_store={folder / 's'},{settings}"
    return without_hook(COMMAND, folder, *words, "--model_args", given)


def test_the_command_without_the_hook(release, home, tmp_path):
    """lm-eval's command already holds its own function for tables when it loads our class."""
    done = command_without_hook(home, tmp_path, "coupling_ranks=2,coupling_limit=2")
    assert done.returncode == 0, done.stderr[-3000:]
    table, _, summary = done.stdout.partition("Coupling at K = 2")
    assert "|coupling" in table and "2 of 8" in summary and "tiny_choice" in summary
    assert "Coupling at K = 2" not in summary
    assert len(load_records(tmp_path / "out")) == 2


def test_a_wrong_argument_without_the_hook(release, home, tmp_path):
    done = command_without_hook(home, tmp_path, "coupling_rank=4")
    sentence = "lm-eval-coupling: got unknown argument coupling_rank, did you mean coupling_ranks"
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(sentence)


@only_next
def test_the_command_with_the_hook(release, home, tmp_path):
    printed = run(command(home, tmp_path / "out", tmp_path / "s", limit=2))
    assert "Coupling at K = 2" in printed and "2 of 8" in printed
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    values = [json.loads(line)["coupling"] for line in samples.read_text().splitlines()]
    assert sum(value is not None for value in values) == 2 == len(load_records(tmp_path / "out"))


@only_next
def test_several_processes(release, home, tmp_path):
    """The next release gathers in another way; `CouplingLM` had relied on this one's."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(evaluation(home, "choice", tmp_path / "out", tmp_path / "s", launcher=launcher))
    assert (
        written(tmp_path / "out")["config"]["coupling"]["measured"]
        == len(load_records(tmp_path / "out"))
        == 8
    )
