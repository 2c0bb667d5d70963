"""Evaluations by lm-eval, in this process or in fresh ones, and what they leave."""

import json
import os
import sqlite3
import subprocess
from pathlib import Path

import lm_eval
import numpy as np
from forked import forked_python
from lean_lm_eval import lean_lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

HOOK = Path(__file__).parents[2] / "hook"
ENVIRONMENT: dict[str, str] = {}  # of fresh processes, for tests that change it
KINDS = ("choice", "generate", "winogrande", "blimp", "rolling")


def scores(results):
    """Metrics and samples, as far as `hf` has them."""
    metrics = {
        task: {k: v for k, v in row.items() if not k.startswith("coupling")}
        for task, row in results["results"].items()
    }
    kept = ("doc_id", "arguments", "resps", "filtered_resps", "acc", "exact_match")
    samples = {
        t: [{k: str(s[k]) for k in kept if k in s} for s in rows]
        for t, rows in results["samples"].items()
    }
    return metrics, samples


def environment():
    kept = {k: v for k, v in os.environ.items() if k != "LM_EVAL_COUPLING_NO_HOOK"}
    path = os.pathsep.join([lean_lm_eval(), str(HOOK.parent)])
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    kept |= ENVIRONMENT
    return kept | {
        "ACCELERATE_USE_CPU": "1"
    }  # without it accelerate takes several processes without GPUs for single ones


def run_python(words, **variables):
    """Run a Python script or module in a process of its own, with further variables."""
    python = forked_python()  # in torch's launchers as well
    return subprocess.run(
        [python, *map(str, words)],
        env=environment() | {"PYTHON_EXEC": python} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def run(words):
    """Run a Python script or module, which must succeed; return all that it prints."""
    done = run_python(words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def written(out):
    (results,) = Path(out).rglob("results_*.json")
    return json.loads(results.read_text())


# Without upstream's tasks, whose index takes ten seconds to build.
EVALUATE = """
import sys
from torch.utils import collect_env
collect_env.get_pretty_env_info = lambda: ""  # for which torch starts eleven programs
from lm_eval_coupling.harness import plugin
plugin.install()
import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
folder, kind, dtype, out, store = sys.argv[1:]
arguments = dict(pretrained=folder + "/float32", device="cpu", coupling_ranks="2+4")
arguments |= dict(coupling_limit="all", coupling_dtype=dtype, coupling_store=store)
tracker = EvaluationTracker(output_path=out)
found = lm_eval.simple_evaluate(
    model="coupling-hf",
    model_args=arguments,
    tasks=["tiny_" + kind],
    bootstrap_iters=2,
    evaluation_tracker=tracker,
    task_manager=TaskManager(include_path=folder + "/tasks", include_defaults=False),
)
if found:
    tracker.save_results_aggregated(results=found, samples=found.pop("samples"))
"""


def evaluation(home, kind, out, store, dtype="float32", launcher=(), before=""):
    """Return words for Python: an evaluation, before which each process runs ``before``."""
    script = home / f"evaluate_{hash(before)}.py"
    script.write_text(before + EVALUATE)
    return [*launcher, script, home, kind, dtype, out, store]


def evaluate_and_log(home, out, *, tasks, **arguments):
    """Evaluate by lm-eval's function in this process, and write results and samples.

    Returns:
        lm-eval's results without the samples, and the samples by task.
    """
    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(home / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        evaluation_tracker=tracker,
        **arguments,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, logged in samples.items():
        tracker.save_results_samples(task, logged)
    return results, samples


def numbers(nested):
    """Nested arrays as Parquet hands them back, as one."""
    return (
        np.concatenate([numbers(x) for x in nested])
        if np.ndim(nested[0])
        else np.asarray(nested, dtype=float)
    )


def stored(store):
    """Key and time of writing of every measurement."""
    if not store.exists():
        return {}
    with sqlite3.connect(store) as db:
        try:
            return dict(db.execute("SELECT key, created FROM measurements"))
        except sqlite3.OperationalError:
            return {}


# lm-eval's own command, with the start-up hook.
COMMAND = (
    f"import site\nsite.addsitedir({str(HOOK)!r})\n"
    "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()\n"
)


def command(home, out, store, *words, limit="all"):
    """Return words for Python: lm-eval's own command with the start-up hook, for a tiny task."""
    script = home / "command.py"
    script.write_text(COMMAND)
    coupling = f"coupling_ranks=2+4,coupling_limit={limit},coupling_store={store}"
    options = {
        "--model": "coupling-hf",
        "--model_args": f"pretrained={home / 'float32'},{coupling}",
        "--tasks": "tiny_choice",
        "--include_path": home / "tasks",
        "--output_path": out,
    }
    given = [word for option in options.items() for word in option]
    return [script, *given, "--log_samples", *words]
