"""Evaluated documents with their requests, read from lm-eval's loaded tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from lm_eval_coupling.harness.lm_eval_internals import split_nested_tasks
from lm_eval_coupling.runs.rows import DocumentKey


@dataclass(frozen=True)
class Document:
    """An evaluated document of this process.

    Attributes:
        key: its identity.
        doc_id: its number among the evaluated documents of its task.
        requests: lm-eval's `Instance`s, in the order of their ``idx``.
        target: what the task's ``doc_to_target`` returns; None if it has none.
    """

    key: DocumentKey
    doc_id: int
    requests: list[Any]
    target: Any


@dataclass(frozen=True)
class Requested:
    """The tasks and groups that were asked for.

    Attributes:
        tasks: the leaf tasks by name.
        roots: the requested tasks and groups; a task is its name, a group the list of its members.
        names: the names of ``roots``.
        members: names of the leaf tasks of every group.
    """

    tasks: dict[str, Any]
    roots: list[Any]
    names: list[str]
    members: dict[str, list[str]]

    @classmethod
    def of(cls, task_dict: Mapping[str, Any]) -> Requested:
        """Read what `TaskManager.load` returned, or the nested dict of older callers."""
        if "tasks" in task_dict:
            tasks, groups = task_dict["tasks"], task_dict.get("groups", {})
        else:
            groups, tasks = split_nested_tasks(task_dict)
        inner = {g.name for group in groups.values() for g in group.get_all_groups()}
        outer = {name: group for name, group in groups.items() if name not in inner}
        members = {
            name: [task.task_name for task in group.get_all_tasks()]
            for name, group in groups.items()
        }
        grouped = {name for names in members.values() for name in names}
        alone = [name for name in tasks if name not in grouped]
        roots = [*map(_nested, outer.values()), *alone]
        return cls(dict(tasks), roots, [*outer, *alone], members)

    def count(self, limit: float | None, samples: Mapping[str, Any]) -> dict[str, int]:
        """Return how many documents lm-eval will evaluate of every task or group in ``names``.

        Args:
            limit: lm-eval's ``--limit``, a number or a share of each task.
            samples: lm-eval's ``--samples``, numbers of documents by task.
        """
        from lm_eval.evaluator_utils import get_sample_size

        counts = {}
        for name, task in self.tasks.items():
            most = get_sample_size(task, limit)
            available = len(task.eval_docs)
            counts[name] = available if most is None else min(available, most)
            if samples.get(name):
                counts[name] = len(set(samples[name]))
        return {
            name: sum(counts[leaf] for leaf in set(self.members.get(name, [name])))
            for name in self.names
        }

    def documents(self) -> list[Document]:
        """Return this process's documents; equal ones with equal prompts are one document."""
        documents: dict[DocumentKey, Document] = {}
        for name, task in self.tasks.items():
            for document in _documents(name, task):
                documents.setdefault(document.key, document)
        return list(documents.values())


def doc_hash(doc: Any) -> str:
    """Return lm-eval's own hash of a document, on which samples and tables are joined."""
    return hash_string(
        json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    )


def _nested(group: Any) -> list[Any]:
    return [
        member.task_name if hasattr(member, "task_name") else _nested(member) for member in group
    ]


def _documents(name: str, task: Any) -> Iterable[Document]:
    by_id: dict[int, list[Any]] = {}
    for instance in task.instances or []:
        by_id.setdefault(instance.doc_id, []).append(instance)
    for doc_id, requests in by_id.items():
        requests.sort(key=lambda request: request.idx)
        first = requests[0]
        key = DocumentKey(name, doc_hash(first.doc), hash_string(first.arguments[0]))
        yield Document(key=key, doc_id=doc_id, requests=requests, target=_target(task, first.doc))


def _target(task: Any, doc: Any) -> Any:
    """Return the document's target, which is needed only where there is no context."""
    try:
        return task.doc_to_target(doc)
    except Exception:  # tasks written in Python may have none
        return None
