"""A plan, read from YAML: which models at which revisions, on which tasks, measured how, and where the work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.sweep import yaml12
from lm_eval_coupling.sweep.fields import Fields, is_text, is_whole
from lm_eval_coupling.sweep.units import Task, Unit, read_units

# What the sweep decides itself, or what would spoil it.
_NOT_FOR_LM_EVAL = {
    "model": "models",
    "model_args": "models and coupling",
    "tasks": "tasks",
    "output_path": "output",
    "metadata": "nothing (it carries what the sweep must know)",
    "config": "nothing (the plan is one)",
    "samples": "lm_eval.limit",
    "predict_only": "nothing (a sweep is for scores)",
    "use_cache": "run.keep_scores, because lm-eval's cache does not know whose scores it holds",
}


class PlanError(CouplingError):
    """Everything that is wrong with a plan, a sentence each."""

    def __init__(self, file: Path, problems: list[str], plan: Plan | None = None) -> None:
        """Say how many there are, and all of them; ``plan`` is what can be read of it all the same."""
        self.problems, self.plan = problems, plan
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"got {file} with {count}:", *problems]))


@dataclass(frozen=True, kw_only=True)
class Local:
    """This machine: workers side by side, on devices or sharing the processor's cores."""

    workers: int | None = None
    devices: tuple[str, ...] | None = None
    threads: int | None = None
    keep_scores: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A cluster: one element of an array for each unit."""

    hours: float
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0
    cpus: int | None = None
    memory_gb: float | None = None
    at_once: int | None = None
    requeues: int = 3
    setup: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_scores: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan that can be carried out, as far as its text tells."""

    file: Path
    units: tuple[Unit, ...]
    tasks: tuple[Task, ...]
    coupling: Mapping[str, Any]
    lm_eval: Mapping[str, Any]
    output: Path
    run: Local | Slurm

    def folder(self, unit: Unit) -> Path:
        """Where everything about a unit lies."""
        return self.output / unit.name

    @property
    def measures(self) -> bool:
        """Whether coupling is measured at all; ``limit: 0`` only scores."""
        return self.coupling.get("limit") not in (0, "0")


def read(file: Path | str) -> Plan:
    """Read a plan; paths in it are seen from the current folder, as lm-eval sees its own.

    Returns:
        The plan, in which everything is known by name and of its type.

    Raises:
        PlanError: with everything that is wrong with it.
        CouplingError: if it cannot be read.
    """
    file = Path(file)
    try:
        content = yaml12.load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CouplingError(
            f"got {file}, which cannot be read ({why(error)}); give a plan in YAML"
        ) from None
    except yaml.YAMLError as error:
        raise CouplingError(f"got {file}, which is no YAML ({_one_line(error)}); mend it") from None
    problems: list[str] = []
    fields = Fields(
        content, "", ["models", "tasks", "coupling", "lm_eval", "output", "run"], problems
    )
    units = read_units(fields)
    tasks = _tasks(fields)
    coupling, lm_eval = _coupling(fields), _lm_eval(fields, tasks)
    output = fields.need("output", is_text, "a folder")
    run = _run(fields)
    if output is None:
        raise PlanError(file, problems)
    plan = Plan(
        file=file,
        units=tuple(units),
        tasks=tuple(tasks),
        coupling=coupling,
        lm_eval=lm_eval,
        output=Path(output).expanduser(),
        run=run or Local(),
    )
    if problems:
        raise PlanError(file, problems, plan)
    return plan


def _tasks(fields: Fields) -> list[Task]:
    given = fields.need(
        "tasks", lambda v: is_text(v) or (isinstance(v, list) and bool(v)), "a list of tasks"
    )
    found: list[Task] = []
    for number, item in enumerate([given] if is_text(given) else given or []):
        if is_text(item):
            found += [Task(name.strip()) for name in item.split(",") if name.strip()]
            continue
        task = Fields(item, f"tasks[{number}]", ["task", "num_fewshot"], fields.problems)
        name = task.need("task", is_text, "the name of a task or group")
        shots = task.whole("num_fewshot", least=0)
        found += [Task(name, shots)] if name else []
    names = [task.name for task in found]
    fields.problems += [
        f"got the task {name} twice; lm-eval runs it once"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return found


def _coupling(fields: Fields) -> dict[str, Any]:
    given = fields.mapping("coupling")
    for name in given:
        if name.startswith("coupling_"):
            fields.problems.append(
                f"got coupling.{name}, expected it without its prefix: {name.removeprefix('coupling_')}"
            )
    if "out" in given:
        fields.problems.append(
            "got coupling.out, expected tables to lie beside their results; leave it out"
        )
    if "dry_run" in given:
        fields.problems.append("got coupling.dry_run, which leaves no results; leave it out")
    return {name: value for name, value in given.items() if not name.startswith("coupling_")}


def _lm_eval(fields: Fields, tasks: list[Task]) -> dict[str, Any]:
    given = fields.mapping("lm_eval")
    for name in given:
        if name in _NOT_FOR_LM_EVAL:
            fields.problems.append(
                f"got lm_eval.{name}, which is not for lm_eval here; use {_NOT_FOR_LM_EVAL[name]}"
            )
    if given.get("num_fewshot") is not None and any(task.num_fewshot is not None for task in tasks):
        fields.problems.append(
            "got lm_eval.num_fewshot beside that of a task, which it would override; give it to each task"
        )
    return {"log_samples": True} | {
        name: value for name, value in given.items() if name not in _NOT_FOR_LM_EVAL
    }


def _run(fields: Fields) -> Local | Slurm | None:
    given = fields.values.get("run") or {"on": "local"}
    on = given.get("on", "local") if isinstance(given, Mapping) else "local"
    if on == "local":
        return _local(given, fields.problems)
    if on == "slurm":
        return _slurm(given, fields.problems)
    fields.problems.append(f"got run.on: {on!r}, expected local or slurm")
    return None


def _local(given: Any, problems: list[str]) -> Local:
    run = Fields(
        given,
        "run",
        ["on", "workers", "devices", "threads", "keep_scores", "environment"],
        problems,
    )
    ids: list[Any] = (
        [run.values["devices"]]
        if is_text(run.values.get("devices"))
        else run.values.get("devices") or []
    )
    if not isinstance(ids, list) or not all(is_text(device) or is_whole(device) for device in ids):
        run.refuse("devices", "cpu, or a list of devices such as [0, 1]")
        ids = []
    return Local(
        workers=run.whole("workers"),
        devices=tuple(map(str, ids)) or None,
        threads=run.whole("threads"),
        keep_scores=_keep_scores(run, False),
        environment=_environment(run),
    )


_WORDS = ("partition", "account", "qos", "constraint")
_SLURM = [
    "on",
    *_WORDS,
    "gpus",
    "cpus",
    "memory_gb",
    "hours",
    "at_once",
    "requeues",
    "setup",
    "options",
]


def _slurm(given: Any, problems: list[str]) -> Slurm:
    run = Fields(given, "run", [*_SLURM, "keep_scores", "environment"], problems)
    run.need("hours", lambda v: True, "the time of a unit in hours")
    return Slurm(
        hours=run.number("hours", 1.0),
        **{name: run.text(name) for name in _WORDS},
        gpus=run.whole("gpus", 0, least=0),
        cpus=run.whole("cpus"),
        memory_gb=run.number("memory_gb"),
        at_once=run.whole("at_once"),
        requeues=run.whole("requeues", 3, least=0),
        setup=tuple(run.texts("setup")),
        options=run.mapping("options"),
        keep_scores=_keep_scores(run, True),
        environment=_environment(run),
    )


def _keep_scores(run: Fields, default: bool) -> bool:
    """Where jobs have to leave before they are done, answers must be kept, or a long one would never end."""
    return run.take("keep_scores", lambda v: isinstance(v, bool), "true or false", default)


def _environment(run: Fields) -> dict[str, str]:
    return {
        name: str(value) for name, value in run.mapping("environment").items() if value is not None
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
