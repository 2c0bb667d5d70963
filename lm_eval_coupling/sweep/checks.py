"""Checks of a plan before any work: its output, its store, and what lm-eval says of the rest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, path, why
from lm_eval_coupling.sweep import state
from lm_eval_coupling.sweep.child_environment import environment
from lm_eval_coupling.sweep.plan import Plan, PlanError, Slurm
from lm_eval_coupling.sweep.plan_secrets import hide
from lm_eval_coupling.sweep.reasons import reason
from lm_eval_coupling.sweep.request import include_paths, overrides_folder
from lm_eval_coupling.sweep.shared_store import locks_work, temporary_folder
from lm_eval_coupling.sweep.source import source
from lm_eval_coupling.versions import installed_version

# Nothing is written or downloaded for a plan that is refused in any case.
_REFUSED: dict[str, Any] = {"overrides": None}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def check(plan: Plan, *, download: bool = False) -> dict[str, Any]:
    """Check a plan against the models, tasks and options that exist.

    With ``download``, models and data sets are fetched as well.

    Returns:
        Mappings with ``d_model, n_layers, n_params, vocab_size, dtype``, by model.

    Raises:
        PlanError: with all problems.
        CouplingError: if the check itself fails.
    """
    problems = [*_output(plan), *_store(plan)]
    question = _question(plan, download)
    remembered = plan.output / "checked.json"
    answer = state.read_json(remembered)
    if problems or download or answer.get("digest") != _digest(plan, question):
        answer = _ask(plan, question | _REFUSED if problems else question)
        if problems := [*problems, *answer["problems"]]:
            raise PlanError(plan.file, [hide(p, plan.secrets.values()) for p in problems])
        with contextlib.suppress(OSError):  # The answer is only kept to save the next check.
            state.write_json(remembered, answer | {"digest": _digest(plan, question)})
    return answer["models"]


def add_checks(error: PlanError) -> PlanError:
    """Return the error with the problems that :func:`check` finds in the readable part of the plan.

    The error comes back unchanged if there is none, or if the check itself fails.
    """
    plan = error.plan
    if plan is None or not plan.units or not plan.tasks:
        return error
    try:
        answer = _ask(plan, _question(plan, download=False) | _REFUSED)
    except CouplingError:  # perhaps because of what is wrong with the text
        return error
    problems = [*_output(plan), *_store(plan), *answer["problems"]]
    hidden = [hide(problem, plan.secrets.values()) for problem in problems]
    return PlanError(plan.file, [*error.problems, *hidden]) if problems else error


def writable(plan: Plan) -> bool:
    """Return whether the output is a folder, or can become one, in which files can be made."""
    return not _output(plan)


def _output(plan: Plan) -> list[str]:
    """Return what is wrong with the output, which is not made: the plan may be refused."""
    try:
        with temporary_folder(plan.output) as folder, tempfile.TemporaryFile(dir=folder):
            return []
    except (OSError, ValueError) as error:
        words = why(error)
        return [f"got output: {plan.output}, which cannot be written ({words}); choose another"]


def _store(plan: Plan) -> list[str]:
    """Return what is wrong with a store shared by several workers, which needs locks that hold."""
    if plan.coupling.get("store") is None:
        return []
    try:
        store = path("coupling.store", plan.coupling["store"])
    except CouplingError as error:
        return [str(error)]
    if isinstance(plan.run, Slurm):
        return [
            "got coupling.store with run.on: slurm, whose nodes may not see each other's locks; "
            "leave it out"
        ]
    if not locks_work(store.parent):
        return [
            f"got coupling.store: {store}, on a file system whose locks do not hold; "
            "leave it out: units have their own"
        ]
    return []


def _question(plan: Plan, download: bool) -> dict[str, Any]:
    """Return what the process of :func:`_ask` is asked, without any secret."""
    models: dict[str, dict[str, Any]] = {}
    for unit in plan.units:
        key = json.dumps([unit.model, unit.arguments], sort_keys=True, default=str)
        entry = {"model": unit.model, "arguments": unit.arguments, "revisions": []}
        models.setdefault(key, entry)["revisions"].append(unit.revision)
    offline = _variables(plan, download).get("HF_HUB_OFFLINE", "").upper()
    return {
        "tasks": [[task.name, task.num_fewshot] for task in plan.tasks],
        "coupling": plan.coupling,
        "lm_eval": plan.lm_eval,
        "models": [*models.values()],
        "overrides": str(overrides_folder(plan)),
        "download": download,
        "offline": offline in ("1", "ON", "YES", "TRUE"),
    }


def _variables(plan: Plan, download: bool) -> dict[str, str]:
    """Return the environment of the units, without the plan's offline flags for a download."""
    own = plan.environment
    if download:
        own = {name: value for name, value in own.items() if name not in _OFFLINE}
    return environment(own)


def _digest(plan: Plan, question: dict[str, Any]) -> str:
    """Return a digest of all that the answer depends on, so that it need not be asked again."""
    folders = [Path(name) for name in (*include_paths(plan), str(overrides_folder(plan)))]
    tasks = [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]
    packages = ("lm-eval", "transformers", "lm-eval-coupling")
    content = {
        "question": question,
        "versions": [installed_version(name) for name in packages],
        "weights": [source(unit, plan.run.environment) for unit in plan.units],
        "tasks": [[str(file), os.path.getmtime(file)] for file in tasks if file.exists()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _ask(plan: Plan, question: dict[str, Any]) -> dict[str, Any]:
    """Answer a question in a process of its own, which loads lm-eval."""
    is_download = question["download"]
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        file.write_text(json.dumps(question, default=str), encoding="utf-8")
        module = "lm_eval_coupling.harness.preflight"
        process = subprocess.run(
            [sys.executable, "-m", module, str(file), str(answer)],
            stderr=None if is_download else subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=_variables(plan, is_download),
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if process.returncode or not answer.exists():
            words = hide(reason(process.stderr or "", process.returncode), plan.secrets.values())
            raise CouplingError(f"the plan could not be checked: {words}")
        return json.loads(answer.read_text(encoding="utf-8"))
