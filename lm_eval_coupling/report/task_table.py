"""One coupling table for the page: means over its documents, and its documents one by one."""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of, headline_rank
from lm_eval_coupling.report.layer_means import LAYERS, LayerMeans, pack
from lm_eval_coupling.report.response_curves import response_curves
from lm_eval_coupling.report.table_numbers import PromptColumns, TableNumbers
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED
from lm_eval_coupling.saved.values import PROMPT, prompt_columns, ranks_of
from lm_eval_coupling.saved.words import SavedWords

_TEXT = 4000  # characters of a prompt that are kept: its end, as few-shot examples come first
_DIRECTIONS = 3  # directions of each layer whose words are kept
_DOCUMENT = (
    *PROMPT,
    "text",
    "picture",
    "normalized_miscoupling",
    "norms",
    "line_shape_score",
    "expodistance",
)


@dataclasses.dataclass(frozen=True)
class TableView:
    """Everything that the page shows of a table but for its means over documents.

    Attributes:
        columns: numbers of its prompts, to be averaged with those of other tables.
        shown: ``ranks``, ``headline``, ``chance`` (by rank), ``mean``, ``measured``, ``profile``
            and ``norms`` (see :class:`LayerMeans`), ``total`` (prompts), ``documents`` and
            ``responses`` (see :func:`response_curves`).
        twin: ``seed, profile, norms`` of the untrained weights, or None.
    """

    columns: PromptColumns
    shown: dict[str, Any]
    twin: dict[str, Any] | None

    def describe(self, numbers: TableNumbers) -> dict[str, Any]:
        """Return all that the page shows.

        Returns:
            ``shown`` with ``worst_certificate``, and ``untrained``: the twin with its ``coupling``
            and the paired ``difference`` at every rank, or None.
        """
        of_twin = self.twin and self.twin | {
            "coupling": {rank: numbers.twin_coupling(rank) for rank in numbers.ranks},
            "difference": {rank: numbers.difference(rank) for rank in numbers.ranks},
        }
        return self.shown | {
            "worst_certificate": numbers.worst_certificate,
            "untrained": of_twin,
        }


def view_table(
    table: SavedTable,
    answers: Mapping[str, Mapping[str, Any]],
    limit: int,
    words: SavedWords | None = None,
) -> TableView:
    """Read a table once; matrices are read some rows at a time.

    Args:
        table: table of one task.
        answers: the model's answers, by ``doc_hash``.
        limit: most prompts to include one by one; means are over all.
        words: words of the directions of some prompts.

    Returns:
        The view.

    Raises:
        UnreadableTable: if the table is damaged.
    """
    with table.opened() as opened:
        columns = prompt_columns(opened, "all", names=())
        ranks = ranks_of(columns)
        headline = headline_rank(ranks) if ranks else None
        prompts = _count_prompts(columns, TRAINED)
        means = LayerMeans(ranks, prompts)
        documents: list[dict[str, Any]] = []
        for row in opened.records(_DOCUMENT if words is None else (*_DOCUMENT, "tokens")):
            means.add(row)
            if len(documents) < limit:
                documents.append(_describe_prompt(row, headline, answers))
                directions = words and words.of(table.about.get("fingerprint"), row)
                if directions:
                    lines = [line for line in directions if line["k"] <= _DIRECTIONS]
                    documents[-1]["words"] = lines
        shown = {
            "ranks": ranks,
            "headline": headline,
            "chance": {rank: chance_coupling(rank) for rank in ranks},
            **means.summary(matrices=True),
            "total": sum(prompts.values()),
            "documents": documents,
            "responses": response_curves(opened, answers, ranks),
        }
        return TableView(columns, shown, _view_twin(opened, columns, ranks))


def _count_prompts(columns: PromptColumns, weights: str) -> Counter[tuple[str, str]]:
    """Return how many prompts each document has, by ``doc_hash, prompt_hash``."""
    rows = zip(columns["doc_hash"], columns["prompt_hash"], columns["weights"], strict=True)
    return Counter((doc, prompt) for doc, prompt, of in rows if of == weights)


def _view_twin(
    table: SavedTable, columns: PromptColumns, ranks: Sequence[int]
) -> dict[str, Any] | None:
    """Return the part of the untrained twin that is not averaged with other tables."""
    if not (prompts := _count_prompts(columns, UNTRAINED)):
        return None
    means = LayerMeans(ranks, prompts)
    for row in table.records(LAYERS, weights=UNTRAINED):
        means.add(row)
    return {
        "seed": (table.about.get("untrained") or {}).get("seed"),
        **means.summary(matrices=False),
    }


def _describe_prompt(
    row: Mapping[str, Any], headline: int | None, answers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the page shows of one prompt, ready for JSON.

    Args:
        row: the prompt's record.
        headline: rank K of the matrix that is shown; None if there is none.
        answers: the model's answers, by ``doc_hash``.
    """
    matrices, text = row["normalized_miscoupling"], row["text"] or ""
    return {
        "id": row["doc_id"],
        "prompt": row["prompt_index"],
        "kind": row["kind"],
        "tokens": row["n_tokens"],
        "position": row["position"],
        "text": text[-_TEXT:],
        "cut": max(0, len(text) - _TEXT),
        "picture": _picture(row.get("picture")),
        "coupling": dict(zip(row["ranks"], couplings_of(matrices) or (), strict=False)),
        "matrix": None if matrices is None else pack(matrices[list(row["ranks"]).index(headline)]),
        "norms": None if row["norms"] is None else row["norms"].astype(float).tolist(),
        "line_shape_score": row["line_shape_score"],
        "expodistance": row["expodistance"],
        "reason": row["reason"],
        "answer": answers.get(row["doc_hash"]),
    }


def _picture(encoded: bytes | None) -> str | None:
    """Return a PNG or JPEG as a data URI, and None for anything else."""
    signatures = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
    for kind, signature in signatures.items():
        if encoded and encoded.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    return None
