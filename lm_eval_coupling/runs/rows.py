"""Measured prompts with the documents they belong to: what a table has a row for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.runs.task_summary import document_value, rests_on_jacobians, summarize
from lm_eval_coupling.saved.tables import TRAINED


class DocumentKey(NamedTuple):
    """What identifies an evaluated document; ``doc_id`` alone does not (``--samples`` renumbers)."""

    task: str
    doc_hash: str
    prompt_hash: str


@dataclass(frozen=True)
class Row:
    """One prompt of a document, measured on one set of weights, ``trained`` or ``untrained``."""

    document: DocumentKey
    doc_id: int
    prompt_index: int
    kind: str
    text: str
    weights: str
    measured: PromptCoupling
    reused: bool = field(default=False, kw_only=True)
    place: int = field(default=0, kw_only=True)

    def to_columns(self) -> dict[str, Any]:
        """As it is written."""
        about = self.document._asdict() | {
            "doc_id": self.doc_id,
            "prompt_index": self.prompt_index,
            "kind": self.kind,
            "text": self.text,
            "n_tokens": len(self.measured.tokens),
            "weights": self.weights,
            "reused": int(self.reused),
            "place": self.place,
        }
        return about | self.measured.to_columns()


def by_document(rows: Iterable[Row]) -> dict[DocumentKey, list[PromptCoupling]]:
    """The prompts of each document, as they were measured at the first of the tokens that were asked for."""
    found: dict[DocumentKey, list[PromptCoupling]] = {}
    for row in rows:
        if row.place == 0:
            found.setdefault(row.document, []).append(row.measured)
    return found


def document_couplings(rows: Iterable[Row], rank: int) -> dict[DocumentKey, float]:
    """A document's coupling at ``rank``; NaN where none of its prompts could be measured."""
    return {key: document_value(prompts, rank) for key, prompts in by_document(rows).items()}


def task_summaries(
    rows: Iterable[Row], tasks: Iterable[str], ranks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Every measure over the documents of each task that has some."""
    documents = by_document(rows)
    found = {}
    for task in tasks:
        if own := {key: prompts for key, prompts in documents.items() if key.task == task}:
            found[task] = summarize(own, ranks)
    return found


def worst_certificate(rows: Iterable[Row]) -> float:
    """The largest relative error of a Jacobian that some number of the trained weights rests on; NaN if there is none.

    Jacobians that were refused have no number, and an untrained twin's are not the model's.

    Returns:
        A relative error.
    """
    found = [
        row.measured.certificate
        for row in rows
        if row.weights == TRAINED and rests_on_jacobians(row.measured)
    ]
    return max((float(certificate.max()) for certificate in found), default=math.nan)


def reasons(rows: Iterable[Row]) -> str:
    """In words, why something is missing."""
    return (
        "; ".join(sorted({row.measured.reason for row in rows if row.measured.reason}))
        or "no prompt"
    )
