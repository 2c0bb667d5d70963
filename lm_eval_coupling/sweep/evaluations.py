"""Logged evaluations that a plan measures its models from, in place of tasks to score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep.fields import Fields
from lm_eval_coupling.sweep.units import Evaluation, Task, Unit

_OPTION = "samples:"


def refuse_scoring(fields: Fields) -> None:
    """Note what a plan says of scoring, which lies behind samples."""
    if fields.values.get("tasks") is not None:
        fields.problems.append(
            "got tasks beside samples, which have tasks of their own; leave out one of them"
        )
    lm_eval, coupling = (fields.values.get(key) for key in ("lm_eval", "coupling"))
    for name in lm_eval if isinstance(lm_eval, Mapping) else ():
        if name != "device":
            fields.problems.append(
                f"got lm_eval.{name} beside samples, which are scored already; leave it out"
            )
    if isinstance(coupling, Mapping) and str(coupling.get("limit")) == "0":
        fields.problems.append(
            "got coupling.limit: 0 beside samples, expected a number of documents to measure, "
            "or all"
        )


def with_evaluations(
    units: Sequence[Unit], samples: Path, output: Path | None, problems: list[str]
) -> tuple[list[Unit], list[Task]]:
    """Return units with the evaluations of their models, and all tasks of these.

    Args:
        units: models with revisions.
        samples: lm-eval's results file, or a folder that holds some, at any depth.
        output: of the plan, which must lie outside of ``samples``.
        problems: sentences on what is missing are added.
    """
    # Imported here, because other plans need no pandas.
    from lm_eval_coupling.samples.logged import of_model, read_results, require_apart

    try:
        results = read_results(samples, _OPTION)
        if output is not None:
            require_apart(samples, output, _OPTION, "output:")
    except CouplingError as error:
        problems.append(str(error))
        return list(units), []
    evaluated = []
    for unit in units:
        try:
            own = of_model(results, samples, unit.model, unit.revision, _OPTION)
            evaluations = tuple(_evaluation(file, content) for file, content in own.items())
            evaluated.append(replace(unit, evaluations=evaluations))
        except CouplingError as error:
            problems.append(str(error))
            evaluated.append(unit)
    names = [task.name for unit in evaluated for of in unit.evaluations for task in of.tasks]
    return evaluated, [Task(name) for name in dict.fromkeys(names)]


def _evaluation(file: Path, results: Mapping[str, Any]) -> Evaluation:
    from lm_eval_coupling.samples.logged import samples_files

    samples = samples_files(file, results)
    about = []
    for logged in (file, *samples.values()):
        state = logged.stat()
        about.append([logged.name, state.st_size, int(state.st_mtime)])
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return Evaluation(file, tuple(Task(name, evaluation=digest) for name in samples))
