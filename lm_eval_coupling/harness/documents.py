"""From lm-eval's loaded tasks to evaluated documents with their requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from lm_eval_coupling.runs.rows import DocumentKey


@dataclass(frozen=True)
class Document:
    """One evaluated document of this process, with its requests in the order of their ``idx``."""

    key: DocumentKey
    doc_id: int
    requests: list[Any]
    target: Any


@dataclass(frozen=True)
class Requested:
    """What was asked for: the leaf ``tasks`` by name, and ``roots``, the tasks and groups as nested lists of names.

    ``members`` are the leaf tasks of every group.
    """

    tasks: dict[str, Any]
    roots: list[Any]
    members: dict[str, list[str]]

    @classmethod
    def of(cls, task_dict: Mapping[str, Any]) -> Requested:
        """Read what `TaskManager.load` returned, or the nested dict of older callers."""
        if "tasks" in task_dict:
            tasks, groups = task_dict["tasks"], task_dict.get("groups", {})
        else:
            from lm_eval.evaluator_utils import _handle_back_comp

            groups, tasks = _handle_back_comp(dict(task_dict))
        inner = {g.name for group in groups.values() for g in group.get_all_groups()}
        roots: list[Any] = [_nested(group) for name, group in groups.items() if name not in inner]
        members = {
            name: [task.task_name for task in group.get_all_tasks()]
            for name, group in groups.items()
        }
        grouped = {name for names in members.values() for name in names}
        return cls(dict(tasks), roots + [name for name in tasks if name not in grouped], members)

    def documents(self) -> list[Document]:
        """Those of this process; equal documents with equal prompts are one."""
        found: dict[DocumentKey, Document] = {}
        for name, task in self.tasks.items():
            for document in _documents(name, task):
                found.setdefault(document.key, document)
        return list(found.values())


def doc_hash(doc: Any) -> str:
    """lm-eval's own hash of a document: what samples and tables are joined on."""
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
    """The task's target; tasks written in Python may have none, and it only matters where there is no context."""
    try:
        return task.doc_to_target(doc)
    except Exception:
        return None
