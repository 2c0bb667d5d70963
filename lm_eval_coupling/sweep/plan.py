"""Plans of sweeps, read from YAML: models and revisions, tasks, settings, and where to run."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lm_eval_coupling.errors import CouplingError, message_of, path, shown, why
from lm_eval_coupling.saved.fact_types import is_name, is_number
from lm_eval_coupling.sweep import yaml12
from lm_eval_coupling.sweep.evaluations import refuse_scoring, with_evaluations
from lm_eval_coupling.sweep.fields import Fields, is_whole
from lm_eval_coupling.sweep.plan_options import check_coupling, check_lm_eval
from lm_eval_coupling.sweep.plan_secrets import hide, secret_in, secrets_in
from lm_eval_coupling.sweep.units import Task, Unit, plain, read_units, wrong_value

# Options of lm-eval that the sweep sets itself, or that would spoil it, and what to use instead.
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
_MAX_PROBLEMS = 40
_MAX_NAME = 255  # bytes in one part of a path, on all common file systems
_MAX_STORE_PATH = 490  # bytes, with the endings of SQLite's further files; SQLite opens 512
_LONGEST_ENDING = len("untrained_coupling__2026-01-01T00-00-00.000000.parquet.superseded")


class PlanError(CouplingError):
    """Problems of a plan, one sentence each."""

    def __init__(self, file: Path, problems: list[str], plan: Plan | None = None) -> None:
        """Count and list the problems; ``plan`` holds what could be read in spite of them."""
        self.problems, self.plan = problems, plan
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = problems[:_MAX_PROBLEMS]
        if len(problems) > len(listed):
            listed = [*listed, f"and {len(problems) - len(listed)} more"]
        super().__init__("\n  ".join([f"got {file} with {count}:", *listed]))


@dataclass(frozen=True, kw_only=True)
class Local:
    """Settings of a sweep on this machine: workers on devices or sharing the processor's cores."""

    workers: int | None = None
    devices: tuple[str, ...] | None = None
    threads: int | None = None
    keep_scores: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Settings of a sweep on a cluster: one job for each unit."""

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
    """Plan whose text is right.

    ``samples`` are evaluations that the units are measured from; without them ``tasks`` are scored.
    ``secrets`` are the variables of the runs that must not be written to any file. They are no
    part of ``run.environment``.
    """

    file: Path
    units: tuple[Unit, ...]
    tasks: tuple[Task, ...]
    samples: Path | None = None
    coupling: Mapping[str, Any]
    lm_eval: Mapping[str, Any]
    output: Path
    run: Local | Slurm
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def folder(self, unit: Unit) -> Path:
        """Return the folder of all files of a unit."""
        return self.output / unit.name

    def tasks_of(self, unit: Unit) -> tuple[Task, ...]:
        """Return the tasks of a unit: those of its evaluations, or all that the plan names."""
        if self.samples is None:
            return self.tasks
        return tuple(task for evaluation in unit.evaluations for task in evaluation.tasks)

    @property
    def measures(self) -> bool:
        """False if coupling is not measured at all, as with ``limit: 0``."""
        return self.coupling.get("limit") not in (0, "0")

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the plan sets for its runs, secrets included."""
        return {**self.run.environment, **self.secrets}


def read(file: Path | str) -> Plan:
    """Read a plan. Paths in it are relative to the current folder, as for lm-eval.

    Returns:
        The plan, in which every key is known and every value is of its type.

    Raises:
        PlanError: with all problems of its text.
        CouplingError: if the file cannot be read or is no YAML.
    """
    file = Path(file)
    content = _read_yaml(file)
    problems: list[str] = []
    keys = ["models", "tasks", "samples", "coupling", "lm_eval", "output", "run"]
    fields = Fields(content, "", keys, problems)
    units, tokens = read_units(fields)
    samples = _path(fields, "samples") if fields.values.get("samples") is not None else None
    tasks = _tasks(fields) if fields.values.get("samples") is None else []
    coupling, lm_eval = _coupling(fields, units), _lm_eval(fields, tasks)
    output = _path(fields, "output")
    if samples is not None:
        refuse_scoring(fields)
        units, tasks = with_evaluations(units, samples, output, problems)
    run, secrets = _run(fields, tokens)
    plan = None
    if output is not None:
        plan = Plan(
            file=file,
            units=tuple(units),
            tasks=tuple(tasks),
            samples=samples,
            coupling=coupling,
            lm_eval=lm_eval,
            output=output,
            run=run or Local(),
            secrets=secrets,
        )
        problems += _too_long(plan)
    if plan is None or problems:
        raise PlanError(file, [hide(problem, secrets_in(content)) for problem in problems], plan)
    return plan


def _read_yaml(file: Path) -> Any:
    """Return the content of a plan's YAML.

    Raises:
        CouplingError: if it is no regular file, cannot be read, is no YAML, or is too large.
    """
    try:
        if not file.is_file() and file.exists() and not file.is_dir():
            raise CouplingError(f"got {file}, which is no regular file; give a plan in YAML")
        with file.open(encoding="utf-8") as text:
            # yaml12 refuses long before this; the limit keeps a huge file out of memory.
            return yaml12.load(text.read(10**7))
    except (OSError, UnicodeDecodeError) as error:
        raise CouplingError(
            f"got {file}, which cannot be read ({why(error)}); give a plan in YAML"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        words = message_of(error.problem or error.context, 200)
        raise CouplingError(
            f"got {file}, which cannot be read as a plan ({words}{place}); correct it"
        ) from None
    except yaml.YAMLError as error:
        words = message_of(error, 200)
        raise CouplingError(
            f"got {file}, which cannot be read as a plan ({words}); correct it"
        ) from None


def _path(fields: Fields, key: str) -> Path | None:
    name = fields.need(key, is_name, "a folder")
    try:
        return None if name is None else path(fields.at(key), name)
    except CouplingError as error:
        fields.problems.append(str(error))
        return None


def _too_long(plan: Plan) -> list[str]:
    """Return a problem for each name too long for a file system, before it costs an evaluation."""
    problems = []
    for task in plan.tasks:
        if len(os.fsencode(task.name)) + _LONGEST_ENDING > _MAX_NAME:
            most = _MAX_NAME - _LONGEST_ENDING
            problems.append(
                f"got the task {task.name[:40]}… of {len(os.fsencode(task.name))} bytes, expected "
                f"at most {most} because its files carry the name; give it a shorter one"
            )
    for unit in plan.units:
        # lm-eval makes one folder name of the whole model name.
        size = len(os.fsencode(re.sub(r"[\"<>:/|\\?*\[\]]+", "__", unit.model)))
        if size > _MAX_NAME:
            problems.append(
                f"got the model {unit.model}, whose results need a folder name of {size} bytes, "
                f"expected at most {_MAX_NAME}; link to the model by a shorter path"
            )
    longest = max((len(os.fsencode(unit.name)) for unit in plan.units), default=0)
    size = len(os.fsencode(plan.output.absolute())) + longest + len("//measurements-00.sqlite")
    if size > _MAX_STORE_PATH:
        problems.append(
            f"got output: {plan.output}, in which the store's path has {size} bytes, expected at "
            f"most {_MAX_STORE_PATH}; choose a folder with a shorter path"
        )
    return problems


def _tasks(fields: Fields) -> list[Task]:
    tasks: list[Task] = []
    items = fields.items("tasks", "a list of tasks, or samples of evaluations")
    for number, item in enumerate(items):
        if is_name(item):
            tasks += [Task(name.strip()) for name in item.split(",") if name.strip()]
            continue
        entry = Fields(item, f"tasks[{number}]", ["task", "num_fewshot"], fields.problems)
        name = entry.need("task", is_name, "the name of a task or group")
        shots = entry.whole("num_fewshot", low=0)
        tasks += [Task(name, shots)] if name else []
    counts = Counter(task.name for task in tasks)
    fields.problems += [
        f"got the task {name} twice; lm-eval runs it once"
        for name, count in sorted(counts.items())
        if count > 1
    ]
    return tasks


def _coupling(fields: Fields, units: Sequence[Unit]) -> dict[str, Any]:
    coupling = fields.mapping("coupling")
    for name in coupling:
        if name.startswith("coupling_"):
            fields.problems.append(
                f"got coupling.{name}, expected it without its prefix: "
                f"{name.removeprefix('coupling_')}"
            )
    if "out" in coupling:
        fields.problems.append(
            "got coupling.out, expected tables to lie beside their results; leave it out"
        )
    if "dry_run" in coupling:
        fields.problems.append("got coupling.dry_run, which leaves no results; leave it out")
    for name, value in coupling.items():
        fields.problems += wrong_value(f"coupling.{name}", name, value)
    coupling = {
        name: plain(value) for name, value in coupling.items() if not name.startswith("coupling_")
    }
    if coupling or any(name.startswith("coupling_") for unit in units for name in unit.arguments):
        own = {name: value for name, value in coupling.items() if name not in ("out", "dry_run")}
        check_coupling(own, units, fields.problems)
    return coupling


def _lm_eval(fields: Fields, tasks: list[Task]) -> dict[str, Any]:
    options = fields.mapping("lm_eval")
    for name in options:
        if name in _NOT_FOR_LM_EVAL:
            fields.problems.append(
                f"got lm_eval.{name}, which is not for lm_eval here; use {_NOT_FOR_LM_EVAL[name]}"
            )
    has_shots = any(task.num_fewshot is not None for task in tasks)
    if options.get("num_fewshot") is not None and has_shots:
        fields.problems.append(
            "got lm_eval.num_fewshot beside that of a task, which it would override; "
            "give it to each task"
        )
    for name, value in options.items():
        fields.problems += wrong_value(f"lm_eval.{name}", name, value)
    check_lm_eval(options, fields.problems)
    return {"log_samples": True} | {
        name: plain(value) for name, value in options.items() if name not in _NOT_FOR_LM_EVAL
    }


def _run(fields: Fields, tokens: set[str]) -> tuple[Local | Slurm | None, dict[str, str]]:
    value = fields.values.get("run") or {"on": "local"}
    where = value.get("on", "local") if isinstance(value, Mapping) else "local"
    if where not in ("local", "slurm"):
        fields.problems.append(f"got run.on: {shown(where)}, expected local or slurm")
        return None, {}
    keys = _SLURM if where == "slurm" else _LOCAL
    run = Fields(value, "run", ["on", *keys, "keep_scores", "environment"], fields.problems)
    environment, secrets = _environment(run)
    if tokens:
        secrets.setdefault("HF_TOKEN", min(tokens))
        if tokens != {secrets["HF_TOKEN"]}:
            fields.problems.append(
                "got different tokens for the hub, expected one for all units; "
                "give it once as HF_TOKEN in run.environment"
            )
    return (_slurm if where == "slurm" else _local)(run, environment), secrets


_LOCAL = ["workers", "devices", "threads"]
_NAMES = ("partition", "account", "qos", "constraint")
_SLURM = [
    *_NAMES,
    *("gpus", "cpus", "memory_gb", "hours", "at_once", "requeues", "setup", "options"),
]
# Options of sbatch that submitit or the sweep sets, and on which finding a job's files depends.
_NOT_FOR_SBATCH = {
    *("array", "chdir", "error", "input", "nodes", "ntasks", "open-mode", "output", "parsable"),
    *("signal", "wait", "wrap"),
}


def _local(run: Fields, environment: Mapping[str, str]) -> Local:
    devices = run.values.get("devices") or []
    if is_name(devices):
        devices = [devices]
    if not isinstance(devices, list) or not all(is_name(d) or is_whole(d) for d in devices):
        run.refuse("devices", "cpu, or a list of devices such as [0, 1]")
        devices = []
    return Local(
        workers=run.whole("workers"),
        devices=tuple(map(str, devices)) or None,
        threads=run.whole("threads"),
        keep_scores=run.flag("keep_scores", False),
        environment=environment,
    )


def _slurm(run: Fields, environment: Mapping[str, str]) -> Slurm:
    run.need("hours", lambda v: True, "the time of a unit in hours")
    return Slurm(
        hours=run.number("hours", 1.0),
        **{name: run.name(name) for name in _NAMES},
        gpus=run.whole("gpus", 0, low=0),
        cpus=run.whole("cpus"),
        memory_gb=run.number("memory_gb"),
        at_once=run.whole("at_once"),
        requeues=run.whole("requeues", 3, low=0),
        setup=tuple(run.texts("setup")),
        options=_options(run),
        # Without kept answers, a job that leaves before its end would never end.
        keep_scores=run.flag("keep_scores", True),
        environment=environment,
    )


def _options(run: Fields) -> dict[str, Any]:
    """Return further options of ``sbatch``; each becomes one line of the job's script."""
    options = {name: plain(value) for name, value in run.mapping("options").items()}
    for name, value in options.items():
        place = run.at(f"options.{name}")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            run.problems.append(f"got {place}, expected the long name of an option of sbatch")
        elif name.replace("_", "-") in _NOT_FOR_SBATCH:
            run.problems.append(f"got {place}, which the sweep sets itself; leave it out")
        elif name == "clusters":  # squeue would list the jobs of another cluster
            run.problems.append(f"got {place}, expected SLURM_CLUSTERS in the environment instead")
        elif value is not True and not is_number(value) and not is_name(value):
            expected = "true, a number or a text of one line"
            run.problems.append(f"got {place}: {shown(value)}, expected {expected}")
    return options


def _environment(run: Fields) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables that may be written to files, and those that hold a secret."""
    environment: dict[str, str] = {}
    secrets: dict[str, str] = {}
    for name, value in run.mapping("environment").items():
        place = run.at(f"environment.{name}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            run.problems.append(f"got {place}, expected the name of a variable")
        elif isinstance(value, str) or is_whole(value):
            (secrets if secret_in(name, str(value)) else environment)[name] = str(value)
        elif value is not None:
            run.problems.append(
                f"got {place}: {shown(value)}, expected a text or whole number; put it in quotes"
            )
    return environment, secrets
