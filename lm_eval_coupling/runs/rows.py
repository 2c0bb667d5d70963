"""Measured prompts with the documents that they belong to: the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.formulas.certificates import (
    columns_from_jacobians,
    counted_certificate,
    largest_certificate,
)
from lm_eval_coupling.measures.formulas.choices import PARTS, PROMPT_PART
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.runs.task_summary import document_value, summarize
from lm_eval_coupling.saved.tables import TRAINED


class DocumentKey(NamedTuple):
    """The identity of an evaluated document; ``--samples`` renumbers, so ``doc_id`` is none."""

    task: str
    doc_hash: str
    prompt_hash: str


@dataclass(frozen=True)
class DocumentPrompt:
    """A prompt of an evaluated document, before it is measured.

    Attributes:
        document: the document that it belongs to.
        doc_id: the document's number in the data set.
        index: number of the prompt within its document.
        kind: ``context``, ``continuation``, ``window``, ``text`` or ``image``; or one of
            :data:`~lm_eval_coupling.measures.formulas.choices.PARTS`, for a context with what
            follows it.
        tokens: token ids, or an image's
            :class:`~lm_eval_coupling.residual.image_inputs.ImageTokens`.
        text: the prompt as a reader of the table sees it.
        columns: further columns of its row, such as a picture.
        problem: reason for which it cannot be measured, if that is already known.
        span: tokens of the part that follows the context; None if the prompt is no such text.
        token_texts: every token of ``span``, decoded.
    """

    document: DocumentKey
    doc_id: int
    index: int
    kind: str
    tokens: tuple[int, ...]
    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: Reason | None = None
    span: range | None = None
    token_texts: tuple[str, ...] = ()

    @property
    def part(self) -> str:
        """Part of the document's text that is measured: the prompt, or one of `PARTS`."""
        return self.kind if self.kind in PARTS else PROMPT_PART


@dataclass(frozen=True)
class Row:
    """A prompt measured at one token on one set of weights, ``trained`` or ``untrained``.

    Attributes:
        prompt: the prompt and its document.
        weights: which weights were measured.
        measured: the record.
        reused: True if all of it comes from the store.
        place: number of the token among those that ``coupling_position`` names.
    """

    prompt: DocumentPrompt
    weights: str
    measured: PromptCoupling
    reused: bool = False
    place: int = 0

    @property
    def document(self) -> DocumentKey:
        """The document that the prompt belongs to."""
        return self.prompt.document

    def to_columns(self) -> dict[str, Any]:
        """Return the row as the tables hold it."""
        about = self.document._asdict() | {
            "doc_id": self.prompt.doc_id,
            "prompt_index": self.prompt.index,
            "kind": self.prompt.kind,
            "text": self.prompt.text,
            "n_tokens": len(self.measured.tokens),
            "weights": self.weights,
            "reused": int(self.reused),
            "place": self.place,
        }
        return about | self.measured.to_columns() | self._in_part() | dict(self.prompt.columns)

    def _in_part(self) -> dict[str, Any]:
        """Return where the token lies in a response or continuation; empty for a prompt."""
        if (span := self.prompt.span) is None:
            return {}
        index = self.measured.position - span.start
        return {
            "part_index": index,
            "part_length": len(span),
            "token_text": self.prompt.token_texts[index],
        }


def by_document(rows: Iterable[Row]) -> dict[DocumentKey, list[PromptCoupling]]:
    """Group the records at the first of the measured tokens by document."""
    records: dict[DocumentKey, list[PromptCoupling]] = {}
    for row in rows:
        if row.place == 0:
            records.setdefault(row.document, []).append(row.measured)
    return records


def document_couplings(rows: Iterable[Row], rank: int) -> dict[DocumentKey, float]:
    """Return each document's coupling at ``rank``; NaN if one of its prompts has none."""
    return {key: document_value(prompts, rank) for key, prompts in by_document(rows).items()}


def task_summaries(
    rows: Iterable[Row], tasks: Iterable[str], ranks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Summarize every measure over the documents of each task that has measured ones."""
    documents = by_document(rows)
    summaries = {}
    for task in tasks:
        if own := {key: prompts for key, prompts in documents.items() if key.task == task}:
            summaries[task] = summarize(own, ranks)
    return summaries


def worst_certificate(rows: Iterable[Row]) -> float:
    """Return the largest relative error of a Jacobian of the trained weights that gave a number.

    All measured tokens count. Refused Jacobians give no number. NaN if no number rests on a
    Jacobian.
    """
    numbers = [column.name for columns in columns_from_jacobians() for column in columns]
    return largest_certificate(
        counted_certificate(row.measured, numbers) for row in rows if row.weights == TRAINED
    )


def reasons(rows: Iterable[Row]) -> str:
    """Join the reasons for which something is missing, each once."""
    distinct = {row.measured.reason for row in rows if row.measured.reason}
    return "; ".join(sorted(distinct)) or "no prompt"
