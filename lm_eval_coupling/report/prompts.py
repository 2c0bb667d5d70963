"""One coupling table for the page: mean over its documents, and the documents one by one."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of, headline_rank
from lm_eval_coupling.saved.run import SavedTable
from lm_eval_coupling.saved.values import prompt_values, ranks_of

_TEXT = 4000  # characters of a prompt, its end: few-shot examples come first
_SCALE, _UNDEFINED = 10_000, 0xFFFF
_SHOWN = ("doc_id", "doc_hash", "prompt_index", "kind", "n_tokens", "position", "text", "ranks", "normalized_miscoupling")
_SHOWN += ("norms", "line_shape_score", "expodistance", "reason", "picture")


def describe_table(table: SavedTable, answers: Mapping[str, Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """Everything the page shows of a table; its matrices are held some rows at a time.

    Args:
        table: of one task.
        answers: what the model answered, by ``doc_hash``.
        limit: how many of the measured prompts to include one by one; the mean is over all.

    Returns:
        ``ranks``, ``headline``, ``chance`` (by rank), ``measured`` (documents), ``mean`` (packed m̃ by rank), ``norms``,
        ``worst_certificate``, ``total`` (prompts) and ``documents``.
    """
    values = prompt_values(table)
    ranks = ranks_of(values)
    headline = headline_rank(ranks) if ranks else None
    weights = 1 / values.groupby(["doc_hash", "prompt_hash"])["doc_hash"].transform("size").to_numpy()
    matrices, norms, documents, first = {rank: _Mean() for rank in ranks}, _Mean(), [], 0
    for rows in table.batches(_SHOWN):
        documents += [_document(row, headline, answers) for row in rows.head(limit - len(documents)).to_dict("records")]
        for row, weight in zip(rows.to_dict("records"), weights[first:], strict=False):
            norms.add(row["norms"], weight)
            for rank, matrix in zip(row["ranks"], row["normalized_miscoupling"], strict=True) if _measured(row) else ():
                matrices[rank].add(matrix, weight)
        first += len(rows)
    return {
        "ranks": ranks,
        "headline": headline,
        "chance": {k: chance_coupling(k) for k in ranks},
        "measured": values[values["worst_certificate"].notna()].drop_duplicates(["doc_hash", "prompt_hash"]).shape[0],
        "mean": {k: pack(found.mean()) for k, found in matrices.items() if found.known},
        "norms": norms.mean().tolist() if norms.known else None,
        "worst_certificate": values["worst_certificate"].max(),
        "total": len(values),
        "documents": documents,
    }


def _measured(row: Mapping[str, Any]) -> bool:
    return row["normalized_miscoupling"] is not None


class _Mean:
    """Weighted mean of arrays, entry by entry over what is defined."""

    def __init__(self) -> None:
        self.known = False
        self._total: np.ndarray | float = 0.0
        self._weight: np.ndarray | float = 0.0

    def add(self, array: np.ndarray | None, weight: float) -> None:
        if array is not None:
            defined = np.isfinite(array)
            self._total = self._total + weight * np.where(defined, array, 0).astype(np.float64)
            self._weight = self._weight + weight * defined
            self.known = True

    def mean(self) -> np.ndarray:
        weight = np.asarray(self._weight)
        return np.where(weight > 0, self._total / np.where(weight > 0, weight, 1), np.nan)


def _document(row: Mapping[str, Any], headline: int | None, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
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
    kind = next((kind for kind, first in kinds.items() if (encoded or b"").startswith(first)), None)
    return None if kind is None else f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def pack(matrix: Float[np.ndarray, "layer layer"]) -> str:
    """Base64 of little-endian 16-bit ten-thousandths, row by row; 65535 is undefined. A third of the size of digits."""
    whole = np.where(np.isnan(matrix), _UNDEFINED, np.rint(np.clip(np.nan_to_num(matrix), 0, 1) * _SCALE))
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()
