"""A plan against the world, before any work: is the output writable, do models and tasks exist, would lm-eval refuse it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import state as record
from lm_eval_coupling.sweep.plan import Plan, PlanError, Slurm
from lm_eval_coupling.sweep.reasons import reason
from lm_eval_coupling.sweep.request import overrides_folder
from lm_eval_coupling.sweep.shared_store import locks_work
from lm_eval_coupling.sweep.source import source
from lm_eval_coupling.versions import installed_version

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def check(plan: Plan, *, download: bool = False) -> dict[str, Any]:
    """Facts about the models (``d_model, n_layers, n_params, dtype`` by name), if nothing is wrong.

    Args:
        plan: the plan.
        download: fetch models and data sets as well.

    Returns:
        The facts, by model.

    Raises:
        PlanError: with everything that is wrong.
    """
    problems = [*_output(plan), *_store(plan)]
    question = _question(plan, download)
    remembered = plan.output / "checked.json"
    answer = record.read_json(remembered)
    if problems or download or answer.get("digest") != _digest(plan, question):
        answer = _ask(plan, question)
        if problems := [*problems, *answer["problems"]]:
            raise PlanError(plan.file, problems)
        record.write_json(remembered, answer | {"digest": _digest(plan, question)})
    return answer["models"]


def with_the_world(wrong: PlanError) -> PlanError:
    """A plan whose text is wrong, with what else is wrong with what can be read of it: told at once."""
    if wrong.plan is None or not wrong.plan.units or not wrong.plan.tasks:
        return wrong
    try:
        check(wrong.plan)
    except PlanError as further:
        return PlanError(wrong.plan.file, [*wrong.problems, *further.problems])
    except CouplingError:
        pass  # the check itself failed, perhaps upon what is wrong with the text
    return wrong


def writable(plan: Plan) -> bool:
    """Whether the plan's output is a folder, or can become one, in which files can be made."""
    return not _output(plan)


def _output(plan: Plan) -> list[str]:
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=plan.output):
            return []
    except OSError as error:
        return [
            f"got output: {plan.output}, which cannot be written ({error.strerror}); choose another"
        ]


def _store(plan: Plan) -> list[str]:
    """A store that several workers write to needs locks that hold."""
    if "store" not in plan.coupling:
        return []
    store = Path(str(plan.coupling["store"])).expanduser()
    if isinstance(plan.run, Slurm):
        return [
            "got coupling.store with run.on: slurm, whose nodes may not see each other's locks; leave it out"
        ]
    if not locks_work(store.parent):
        return [
            f"got coupling.store: {store}, on a file system whose locks do not hold; leave it out: units have their own"
        ]
    return []


def _question(plan: Plan, download: bool) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = {}
    for unit in plan.units:
        key = json.dumps([unit.model, unit.arguments], sort_keys=True, default=str)
        entry = models.setdefault(
            key, {"model": unit.model, "arguments": unit.arguments, "revisions": []}
        )
        entry["revisions"].append(unit.revision)
    offline = _environment(plan, download).get("HF_HUB_OFFLINE", "").upper()
    return {
        "tasks": [[task.name, task.num_fewshot] for task in plan.tasks],
        "coupling": plan.coupling,
        "lm_eval": plan.lm_eval,
        "models": [*models.values()],
        "overrides": str(overrides_folder(plan)),
        "download": download,
        "offline": offline in ("1", "ON", "YES", "TRUE"),
    }


def _environment(plan: Plan, download: bool) -> dict[str, str]:
    """That of the units; but to fetch is to be on line, whatever the plan says of nodes without network."""
    told = {
        name: value
        for name, value in plan.run.environment.items()
        if not (download and name in _OFFLINE)
    }
    return {**os.environ, **told}


def _digest(plan: Plan, question: dict[str, Any]) -> str:
    """What the answer depends on: a plan that was found right needs no second look while all this is what it was."""
    given = plan.lm_eval.get("include_path") or []
    folders = [*(given if isinstance(given, list) else [given]), overrides_folder(plan)]
    tasks = [file for folder in folders for file in sorted(Path(folder).rglob("*.yaml"))]
    seen = {
        "question": question,
        "versions": [
            installed_version(name) for name in ("lm-eval", "transformers", "lm-eval-coupling")
        ],
        "weights": [source(unit, plan.run.environment) for unit in plan.units],
        "tasks": [[str(file), file.stat().st_mtime] for file in tasks],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()


def _ask(plan: Plan, question: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: it loads lm-eval, which the sweep itself does without."""
    download = question["download"]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(question, default=str), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "lm_eval_coupling.harness.preflight",
            str(asked),
            str(answer),
        ]
        ended = subprocess.run(
            command,
            stderr=None if download else subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=_environment(plan, download),
            text=True,
            check=False,
        )
        if ended.returncode or not answer.exists():
            raise CouplingError(
                f"the plan could not be checked: {reason(ended.stderr or '', ended.returncode)}"
            )
        return json.loads(answer.read_text(encoding="utf-8"))
