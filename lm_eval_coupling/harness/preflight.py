"""Checks of a plan that need lm-eval, in a process of its own: tasks, options, arguments, models.

    python -m lm_eval_coupling.harness.preflight QUESTION.json ANSWER.json

:mod:`lm_eval_coupling.sweep.checks` writes the question. The answer has ``problems`` (sentences)
and ``models`` (facts by model). The folder ``overrides`` gets a file for each task whose number of
examples is set; null for none. With ``download``, models and data sets are fetched into the caches.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lm_eval_coupling.errors import message_of, nearest
from lm_eval_coupling.harness import plugin


def main(question: Path, answer: Path) -> None:
    """Read a question and write its answer."""
    plugin.install()
    request = json.loads(question.read_text(encoding="utf-8"))
    from lm_eval.tasks import TaskManager

    from lm_eval_coupling.harness import preflight_models

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    problems: list[str] = []
    given = request["lm_eval"].get("include_path") or []
    include = given if isinstance(given, list) else [given]
    problems += [
        f"got lm_eval.include_path: {path!r}, which is no folder"
        for path in include
        if not Path(path).is_dir()
    ]
    manager = TaskManager(include_path=[*include])
    problems += _tasks(manager, [name for name, _ in request["tasks"]])
    problems += _lm_eval(request["lm_eval"])
    if request["lm_eval"].get("trust_remote_code"):  # which lm-eval hands on to the model
        request["models"] = [
            {**m, "arguments": {"trust_remote_code": True, **m["arguments"]}}
            for m in request["models"]
        ]
    models, of_models = preflight_models.check(
        request["models"], request["coupling"], offline=request["offline"]
    )
    problems += of_models
    if not problems and request["overrides"] is not None:
        _override(
            manager,
            {name: shots for name, shots in request["tasks"] if shots is not None},
            Path(request["overrides"]),
        )
        if request["download"]:
            problems += _download(
                TaskManager(include_path=[*include, request["overrides"]]), request
            )
    answer.write_text(json.dumps({"problems": problems, "models": models}), encoding="utf-8")


def _tasks(manager: Any, names: list[str]) -> Iterator[str]:
    named_by: dict[str, str] = {}
    for name in names:
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                yield f"got the task {name}, which is no file"
            continue
        matches = manager.match_tasks([name])
        if not matches:
            yield (
                f"got the task {name}, which lm-eval does not know; "
                f"did you mean {nearest(name, manager.all_tasks)}?"
            )
        for leaf in [leaf for match in matches for leaf in _leaves(manager.task_index, match)]:
            if named_by.setdefault(leaf, name) != name:
                yield (
                    f"got the task {leaf} twice, in {named_by[leaf]} and in {name}; "
                    "lm-eval refuses that"
                )
                break


def _leaves(index: Mapping[str, Any], name: str, above: tuple[str, ...] = ()) -> set[str]:
    """Return the tasks of a task, group or tag, as far as its file names them."""
    entry = index.get(name)
    if entry is None or name in above:
        return {name}
    if entry.kind.name == "TAG":
        return set(entry.tags)
    if entry.kind.name != "GROUP":
        return {name}
    children = (entry.cfg or {}).get("task") or []
    named = [
        c if isinstance(c, str) else c.get("task") or c.get("group")
        for c in children
        if isinstance(c, str | dict)
    ]
    return {
        leaf
        for child in named
        if isinstance(child, str)
        for leaf in _leaves(index, child, (*above, name))
    }


def _lm_eval(given: Mapping[str, Any]) -> Iterator[str]:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    options = [field.name for field in fields(EvaluatorConfig)]
    unknown = [name for name in given if name not in options]
    for name in unknown:
        yield (
            f"got lm_eval.{name}, which lm-eval does not know; "
            f"did you mean {nearest(name, options)}?"
        )
    if not unknown:
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "lm_eval.yaml")
                written = {**given, "tasks": ["-"], "output_path": "-", "model_args": {}}
                file.write_text(yaml.safe_dump(written), encoding="utf-8")
                EvaluatorConfig.from_config(file)
        except (ValueError, TypeError) as error:
            yield f"got lm_eval as lm-eval refuses it: {' '.join(str(error).split())}"


def _override(manager: Any, shots: Mapping[str, int], folder: Path) -> None:
    """Write tasks of the same names with other numbers of examples.

    lm-eval has one number for all tasks of a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for name, number in shots.items():
        for entry in _entries(manager, name):
            kind = "group" if entry.kind.name == "GROUP" else "task"
            # Without its tags: the index would else know the tag for this task alone.
            made = {
                "include": str(Path(entry.yaml_path).resolve()),
                kind: entry.name,
                "tag": None,
                "num_fewshot": number,
            }
            file = folder / f"{entry.name.replace('/', '-')}.yaml"
            file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")


def _entries(manager: Any, name: str) -> Iterable[Any]:
    for match in manager.match_tasks([name]):
        entry = manager.task_index[match]
        yield from (
            (manager.task_index[tagged] for tagged in sorted(entry.tags))
            if entry.kind.name == "TAG"
            else [entry]
        )


def _download(manager: Any, request: Mapping[str, Any]) -> Iterator[str]:
    from lm_eval_coupling.harness import preflight_models

    for name in [
        match for task, _ in request["tasks"] for match in manager.match_tasks([task]) or [task]
    ]:
        print(f"data of {name} …", file=sys.stderr, flush=True)
        try:
            manager.load([name])
        except Exception as error:  # each data set fails in its own way; the others are fetched
            yield f"got the task {name}, whose data cannot be fetched: {message_of(error)}"
    yield from preflight_models.download(request["models"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
