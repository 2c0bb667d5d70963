"""Sweeps of real tiny models by lm-eval itself, in processes of their own."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import tiny
import yaml
from forked import forked_python

from lm_eval_coupling import load_runs
from lm_eval_coupling.sweep import plan as plans
from lm_eval_coupling.sweep.request import store_file

QUICK = str(Path(__file__).with_name("quick_lm_eval.py"))
# Without the check, which loads lm-eval and its index of tasks: it has tests of its own.
SWEEP = """
import sys
from lm_eval_coupling.sweep import command
from lm_eval_coupling.sweep import checks
checks.check = lambda plan, **options: {}
sys.exit(command.sweep(sys.argv[1], command=sys.argv[2:] or None))
"""
LONG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 20,
}  # long enough to be met while it measures


def models_and_tasks(folder):
    """A model that is quickly measured and one that is not, and two tasks."""
    tiny.save_model(folder / "tiny-2", num_hidden_layers=2)
    tiny.save_model(folder / "tiny-long", **LONG)
    return [tiny.save_task(folder / "tasks", kind) for kind in ("choice", "winogrande")]


def write_plan(folder, out, names, run, coupling=None):
    content = {
        "models": [
            {"model": str(folder / name), "facts": {"family": "tiny", "released": 2024.5}}
            for name in names
        ],
        "tasks": ["tiny_choice", "tiny_winogrande"],
        "coupling": {"ranks": "2+4", "limit": "all", "measures": "depth"} | (coupling or {}),
        "lm_eval": {"batch_size": 4, "include_path": str(folder / "tasks"), "device": "cpu"},
        "output": str(out),
        "run": run | {"environment": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}},
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    return plans.read(file)


def start(plan, command=None):
    """The command, in a process of its own; ``command`` evaluates a unit, () the default one."""
    command = [forked_python(), QUICK] if command is None else command
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(plan.file), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(head, seconds=300):
    """Its exit code; what it said is shown if a test fails."""
    said, _ = head.communicate(timeout=seconds)
    print(said)
    return head.returncode


def measured(plan, unit):
    """How many prompts of a unit are stored, one measurement each."""
    file = store_file(plan.folder(unit))
    if not file.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as store:
            return store.execute("SELECT COUNT(*) FROM measurements").fetchone()[0]
    except sqlite3.Error:
        return 0


def table(out):
    """What `fit` reads of a sweep: numbers that do not say when and how it ran."""
    runs = load_runs(out).sort_values(["model", "task"], ignore_index=True)
    return runs.drop(columns=["date", "file", "run_id"])
