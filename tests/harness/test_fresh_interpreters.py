"""lm-eval in fresh interpreters, with and without the start-up hook: nothing other models notice,
refusals before work.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from forked import forked_python

pytest.importorskip("lm_eval")
HOOK = Path(__file__).parents[2] / "hook"
OPT_OUT = "LM_EVAL_COUPLING_NO_HOOK"


def run_code(code, *words, hook, python=None):
    """Run ``code`` by an interpreter with all packages, with or without what the hook does."""
    environment = {k: v for k, v in os.environ.items() if k != OPT_OUT} | (
        {} if hook else {OPT_OUT: "1"}
    )
    start = f"import site; site.addsitedir({str(HOOK)!r})\n"
    found = subprocess.run(
        [python or forked_python(), "-c", start + code, *map(str, words)],
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOOK.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


EVALUATE = """
import logging, sys
from lm_eval import simple_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

model_folder, tasks_folder, out, *names = sys.argv[1:]
for model, arguments in {"dummy": "", "hf": f"pretrained={model_folder}"}.items():
    tracker = EvaluationTracker(output_path=f"{out}/{model}")
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=tasks_folder, include_defaults=False),
        evaluation_tracker=tracker,
        device="cpu",
        batch_size=4,
        limit=4,
        bootstrap_iters=2,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for name in names:
        tracker.save_results_samples(name, samples[name])
    print(make_table(results))
print("models:", *sorted(model_registry))
print("ours:", *sorted(name for name in sys.modules if name.startswith("lm_eval_coupling")))
"""
TIMES = {"date", "start_time", "end_time", "total_evaluation_time_seconds"}


def saved(folder):
    """Every file below, by its name without the date; results without the times."""
    found = {}
    for path in sorted(Path(folder).rglob("*.json*")):
        text = path.read_text()
        if path.suffix == ".json":
            text = {key: value for key, value in json.loads(text).items() if key not in TIMES}
        found[re.sub(r"_\d{4}-.*\.", ".", str(path.relative_to(folder)))] = text
    return found


@pytest.mark.slow
def test_other_models_are_evaluated_as_without_us(tmp_path):
    names = [tiny.save_task(tmp_path / "tasks", kind) for kind in ("choice", "generate")]
    words = tiny.save_model(tmp_path / "model", num_hidden_layers=2), tmp_path / "tasks"
    with_hook, without = (
        run_code(EVALUATE, *words, tmp_path / str(hook), *names, hook=hook)
        for hook in (True, False)
    )
    (*tables, models, ours), (*tables_without, models_without, none) = (
        with_hook.splitlines(),
        without.splitlines(),
    )
    assert "lm_eval_coupling.harness.hooks" in ours and none == "ours:"
    assert {*models.split()} - {*models_without.split()} == {"coupling-hf"}
    assert {*models_without.split()} > {"hf", "dummy", "vllm"} and {*models_without.split()} < {
        *models.split()
    }
    assert tables == tables_without and sum("|tiny_" in line for line in tables) == 4
    files, files_without = saved(tmp_path / "True"), saved(tmp_path / "False")
    assert len(files) == 6 and files.keys() == files_without.keys()
    for name in files:
        assert files[name] == files_without[name], name


INSTALL = """
import os
from lm_eval import evaluator
from lm_eval.api.registry import model_registry
import lm_eval.loggers.evaluation_tracker, lm_eval.models, lm_eval.tasks.manager
import lm_eval._cli.harness, lm_eval.config.evaluate_config

def look():
    wrapped = (
        evaluator.evaluate,
        evaluator.simple_evaluate,
        lm_eval.loggers.evaluation_tracker.EvaluationTracker.save_results_aggregated,
        lm_eval.tasks.manager.TaskManager.__init__,
        lm_eval.config.evaluate_config.EvaluatorConfig.from_cli.__func__,
        lm_eval._cli.harness.HarnessCLI.execute,
    )
    ours = [hasattr(function, "_of_coupling") for function in wrapped]
    return ["coupling-hf" in model_registry, *ours], wrapped

before = look()
from lm_eval_coupling.harness import plugin
plugin.install()
once = look()
plugin.install()
twice = look()
print(before[0][0], sum(before[0][1:]))
print(once[0][0], sum(once[0][1:]))
print(once[1] == twice[1], os.environ["LM_EVAL_COUPLING_NO_HOOK"])
"""


@pytest.mark.slow
def test_install_takes_effect_on_what_is_loaded_and_only_once():
    assert run_code(INSTALL, hook=False).splitlines() == ["False 0", "True 6", "True 1"]


HEAVY = ("torch", "transformers", "datasets", "pandas")
REFUSED = f"""
import atexit, sys
from lm_eval.__main__ import cli_evaluate
def told():
    print(*[name for name in {HEAVY!r} if name in sys.modules])
atexit.register(told)
try:
    cli_evaluate()
except SystemExit as ended:
    assert ended.code == 2
"""


@pytest.mark.parametrize(
    "wrong",
    ["coupling_rank=4", "coupling_ranks=10+9999", "coupling_position=1.5", "coupling_out=1e5"],
)
def test_a_wrong_argument_is_refused_before_torch_is_loaded(tmp_path, wrong):
    """lm-eval's own command had indexed its tasks and loaded everything before it was told of a
    misspelt word.
    """
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 2}')
    words = [
        "--model",
        "coupling-hf",
        "--model_args",
        f"pretrained={tmp_path},{wrong}",
        "--tasks",
        "arc_easy",
    ]
    assert run_code(REFUSED, *words, hook=True, python=sys.executable).strip() == ""
