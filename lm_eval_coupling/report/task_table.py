"""One coupling table for the page: mean over its documents, and the documents one by one."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of, headline_rank
from lm_eval_coupling.report.layer_means import Layers, pack
from lm_eval_coupling.report.overview_rows import paired
from lm_eval_coupling.saved.saved_run import SavedTable
from lm_eval_coupling.saved.values import (
    PROMPT,
    document_values,
    mean_and_error,
    prompt_values,
    ranks_of,
)
from lm_eval_coupling.saved.words import SavedWords

_TEXT = 4000  # characters of a prompt, its end: few-shot examples come first
_DIRECTIONS = 3  # of each layer whose words are shown
_SHOWN = (
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
    answers: Mapping[str, Mapping[str, Any]],
    limit: int,
    words: SavedWords | None = None,
) -> dict[str, Any]:
    """Everything the page shows of a table; its matrices are held some rows at a time.

    Args:
        table: of one task.
        answers: what the model answered, by ``doc_hash``.
        limit: how many of the measured prompts to include one by one; the means are over all.
        words: of the directions of some of the prompts.

    Returns:
        ``ranks``, ``headline``, ``chance`` (by rank), ``measured`` (documents), ``mean`` (packed m̃ by rank), ``profile`` (by
        rank, see :class:`Layers`), ``norms``, ``worst_certificate``, ``total`` (prompts), ``documents``, and ``untrained``:
        ``seed, coupling, profile, norms`` of the twin, with the paired ``difference`` at every rank; None if there is none.
    """
    values = prompt_values(table, "all")
    values, untrained = (
        values[values["weights"] == weights] for weights in ("trained", "untrained")
    )
    own, twin = document_values(values), document_values(untrained)
    ranks = ranks_of(values)
    headline = headline_rank(ranks) if ranks else None
    layers = Layers(ranks, _prompts(values))
    documents: list[dict[str, Any]] = []
    for rows in table.batches(_SHOWN if words is None else (*_SHOWN, "tokens")):
        for row in rows.head(limit - len(documents)).to_dict("records"):
            told = words and words.of(table.about.get("fingerprint"), row)
            directions = {"words": [one for one in told if one["k"] <= _DIRECTIONS]} if told else {}
            documents.append(_document(row, headline, answers) | directions)
        layers.add(rows)
    return {
        "ranks": ranks,
        "headline": headline,
        "chance": {k: chance_coupling(k) for k in ranks},
        "measured": len(own.dropna(how="all")),
        **layers.summary(matrices=True),
        "worst_certificate": values["worst_certificate"].max(),
        "total": len(values),
        "documents": documents,
        "untrained": _untrained(table, own, twin, _prompts(untrained)) if len(twin) else None,
    }


def _prompts(values: pd.DataFrame) -> dict[tuple[str, str], int]:
    """How many prompts each document has."""
    return values.groupby(["doc_hash", "prompt_hash"]).size().to_dict()


def _untrained(
    table: SavedTable, own: pd.DataFrame, twin: pd.DataFrame, prompts: dict[tuple[str, str], int]
) -> dict[str, Any]:
    ranks = ranks_of(twin)
    layers = Layers(ranks, prompts)
    for rows in table.batches(
        ("doc_hash", "prompt_hash", "ranks", "normalized_miscoupling", "norms"), weights="untrained"
    ):
        layers.add(rows)
    names = {k: f"coupling@{k}" for k in ranks}
    return {
        "seed": (table.about.get("untrained") or {}).get("seed"),
        "coupling": {k: mean_and_error(twin[name]) for k, name in names.items()},
        "difference": {
            k: paired(own[name].dropna(), twin[name].dropna())
            for k, name in names.items()
            if name in own
        },
        **layers.summary(matrices=False),
    }


def _document(
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
    """A measured image as a URI that holds it; of another kind than pictures are saved in, nothing."""
    kinds = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
    encoded = encoded or b""
    kind = next((kind for kind, first in kinds.items() if encoded.startswith(first)), None)
    return (
        None if kind is None else f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    )
