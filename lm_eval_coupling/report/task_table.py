"""One coupling table for the page: means over its documents, and its documents one by one."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of, headline_rank
from lm_eval_coupling.report.layer_means import LAYERS, LayerMeans, pack
from lm_eval_coupling.report.response_curves import response_curves
from lm_eval_coupling.report.table_numbers import TableNumbers
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.saved.values import PROMPT
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


def describe_table(
    table: SavedTable,
    numbers: TableNumbers,
    answers: Mapping[str, Mapping[str, Any]],
    limit: int,
    words: SavedWords | None = None,
) -> dict[str, Any]:
    """Return what the page shows of a table; matrices are read some rows at a time.

    Args:
        table: table of one task.
        numbers: its means over documents.
        answers: the model's answers, by ``doc_hash``.
        limit: most prompts to include one by one; means are over all.
        words: words of the directions of some prompts.

    Returns:
        ``ranks``, ``headline``, ``chance`` (by rank), ``measured`` (documents), ``mean``,
        ``profile`` and ``norms`` (see :class:`LayerMeans`), ``worst_certificate``, ``total``
        (prompts), ``documents``, ``responses`` (see :func:`response_curves`), and ``untrained``:
        ``seed, coupling, profile, norms`` of the twin with the paired ``difference`` at every rank,
        or None.
    """
    headline = headline_rank(numbers.ranks) if numbers.ranks else None
    means = LayerMeans(numbers.ranks, numbers.prompts)
    documents: list[dict[str, Any]] = []
    for row in table.records(_DOCUMENT if words is None else (*_DOCUMENT, "tokens")):
        means.add(row)
        if len(documents) < limit:
            document = _describe_document(row, headline, answers)
            directions = words and words.of(table.about.get("fingerprint"), row)
            if directions:
                document["words"] = [line for line in directions if line["k"] <= _DIRECTIONS]
            documents.append(document)
    return {
        "ranks": numbers.ranks,
        "headline": headline,
        "chance": {rank: chance_coupling(rank) for rank in numbers.ranks},
        "measured": numbers.measured,
        **means.summary(matrices=True),
        "worst_certificate": numbers.worst_certificate,
        "total": sum(numbers.prompts.values()),
        "documents": documents,
        "responses": response_curves(table, answers, numbers.ranks),
        "untrained": _describe_twin(table, numbers) if numbers.twin_prompts else None,
    }


def _describe_twin(table: SavedTable, numbers: TableNumbers) -> dict[str, Any]:
    """Return what the page shows of the untrained twin."""
    means = LayerMeans(numbers.ranks, numbers.twin_prompts)
    for row in table.records(LAYERS, weights="untrained"):
        means.add(row)
    return {
        "seed": (table.about.get("untrained") or {}).get("seed"),
        "coupling": {rank: numbers.twin_coupling(rank) for rank in numbers.ranks},
        "difference": {rank: numbers.difference(rank) for rank in numbers.ranks},
        **means.summary(matrices=False),
    }


def _describe_document(
    row: Mapping[str, Any], headline: int | None, answers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
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
