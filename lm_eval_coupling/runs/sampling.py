"""The seeded sample of documents to measure, the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from lm_eval_coupling.runs.rows import DocumentKey


def choose(
    keys: Iterable[DocumentKey], roots: Sequence[Any], limit: int | None, seed: int
) -> set[DocumentKey]:
    """Return the keys of at most ``limit`` documents for each requested task or group.

    Args:
        keys: every evaluated document, of all processes.
        roots: what was requested, as nested lists: a task is its name, a group the list of its
            members. A group's documents are spread evenly over its members, so that MMLU's 100 come
            from all its subjects. A task in two members counts once.
        limit: documents per root; None for all.
        seed: of the sample. The order depends on the document alone, not on its task or prompt:
            models, few-shot settings and tasks with the same documents are measured on the same
            ones.
    """
    if limit is None:
        return set(keys)
    by_task: dict[str, list[DocumentKey]] = {}
    for key in sorted(set(keys), key=lambda key: (_shuffled(key, seed), key)):
        by_task.setdefault(key.task, []).append(key)
    chosen: set[DocumentKey] = set()
    for root in roots:
        chosen.update(islice(_documents_in_turn(root, by_task, set()), limit))
    return chosen


def _documents_in_turn(
    task_or_group: Any, by_task: dict[str, list[DocumentKey]], seen: set[DocumentKey]
) -> Iterator[DocumentKey]:
    """Yield the documents of a task, or one of each member of a group after the other, each once.

    So the first documents of a group come from all of its members. ``seen`` is shared by them: a
    document that one of them has yielded is passed over.
    """
    if isinstance(task_or_group, str):
        for key in by_task.get(task_or_group, []):
            if key not in seen:
                seen.add(key)
                yield key
        return
    waiting = [_documents_in_turn(member, by_task, seen) for member in task_or_group]
    while waiting:
        for member in list(waiting):
            try:
                yield next(member)
            except StopIteration:
                waiting.remove(member)


def _shuffled(key: DocumentKey, seed: int) -> str:
    return hashlib.sha256(f"{seed} {key.doc_hash}".encode()).hexdigest()
