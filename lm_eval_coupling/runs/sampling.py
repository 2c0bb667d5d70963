"""Which of the evaluated documents are measured: a seeded sample that does not depend on the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval_coupling.runs.rows import DocumentKey


def choose(
    keys: Iterable[DocumentKey], roots: Sequence[Any], limit: int | None, seed: int
) -> set[DocumentKey]:
    """At most ``limit`` documents for each requested task or group; all of them if ``limit`` is ``None``.

    Args:
        keys: every evaluated document, of all processes.
        roots: what was requested, as nested lists: a task is its name, a group the list of its members. A group's documents
            are spread evenly over its members, so that MMLU's 100 come from all its subjects.
        limit: documents per root.
        seed: of the sample. The order depends on the document alone, not on its task or prompt: every model, every few-shot
            setting and every task that asks the same documents is measured on the same ones.

    Returns:
        Keys of the documents to measure.
    """
    if limit is None:
        return set(keys)
    by_task: dict[str, list[DocumentKey]] = {}
    for key in sorted(set(keys), key=lambda key: (_shuffled(key, seed), key)):
        by_task.setdefault(key.task, []).append(key)
    chosen: set[DocumentKey] = set()
    for root in roots:
        chosen.update(key for _, key in zip(range(limit), _spread(root, by_task), strict=False))
    return chosen


def _spread(root: Any, by_task: dict[str, list[DocumentKey]]) -> Iterator[DocumentKey]:
    """The documents of a task, or those of a group's members in turn."""
    if isinstance(root, str):
        yield from by_task.get(root, [])
        return
    waiting = [_spread(member, by_task) for member in root]
    while waiting:
        for member in list(waiting):
            key = next(member, None)
            if key is None:
                waiting.remove(member)
            else:
                yield key


def _shuffled(key: DocumentKey, seed: int) -> str:
    return hashlib.sha256(f"{seed} {key.doc_hash}".encode()).hexdigest()
