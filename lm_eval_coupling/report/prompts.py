"""One coupling table for the page: mean over its documents, and the documents one by one."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lm_eval_coupling.saved.tables import coupling_of

_TEXT = 4000  # characters of a prompt, its end: few-shot examples come first
_SCALE, _UNDEFINED = 10_000, 0xFFFF


def describe_table(
    records: pd.DataFrame, about: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]], limit: int
) -> dict[str, Any]:
    """Everything the page shows of a table.

    Args:
        records: the table, as :func:`~lm_eval_coupling.saved.tables.load_records` returns it.
        about: its provenance.
        answers: what the model answered, by ``doc_hash``.
        limit: how many of the measured prompts to include one by one; the mean is over all.

    Returns:
        ``ranks``, ``headline``, ``chance`` (m̃, by rank), ``measured`` (documents), ``mean`` (packed m̃ by rank), ``norms``,
        ``total`` (prompts) and ``documents``.
    """
    ranks = [int(rank) for rank in records["ranks"].iloc[0]]
    headline = about.get("headline_rank") if about.get("headline_rank") in ranks else min(ranks)
    pairs = list(records["normalized_miscoupling"])
    weights = 1 / records.groupby(["doc_hash", "prompt_hash"])["doc_hash"].transform("size").to_numpy()
    known = [i for i, matrices in enumerate(pairs) if matrices is not None]
    documents = records.iloc[known].drop_duplicates(["doc_hash", "prompt_hash"])
    chance = about.get("chance") or {}
    return {
        "ranks": ranks,
        "headline": headline,
        "chance": {k: float(chance.get(str(k), math.sqrt(1 - 1 / k))) for k in ranks},
        "measured": len(documents),
        "mean": {k: pack(_mean([pairs[i][at] for i in known], weights[known])) for at, k in enumerate(ranks) if known},
        "norms": _mean_of_known(list(records["norms"]), weights),
        "total": len(records),
        "documents": [_document(row, headline, answers) for row in records.head(limit).to_dict("records")],
    }


def _document(row: Mapping[str, Any], headline: int, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    matrices, text = row["normalized_miscoupling"], row["text"] or ""
    return {
        "id": row["doc_id"],
        "prompt": row["prompt_index"],
        "kind": row["kind"],
        "tokens": row["n_tokens"],
        "position": row["position"],
        "text": text[-_TEXT:],
        "cut": max(0, len(text) - _TEXT),
        "coupling": {} if matrices is None else {k: coupling_of(m) for k, m in zip(row["ranks"], matrices, strict=True)},
        "matrix": None if matrices is None else pack(matrices[list(row["ranks"]).index(headline)]),
        "norms": None if row["norms"] is None else row["norms"].astype(float).tolist(),
        "line_shape_score": row["line_shape_score"],
        "expodistance": row["expodistance"],
        "reason": row["reason"],
        "answer": answers.get(row["doc_hash"]),
    }


def pack(matrix: Float[np.ndarray, "layer layer"]) -> str:
    """Base64 of little-endian 16-bit ten-thousandths, row by row; 65535 is undefined. A third of the size of digits."""
    whole = np.where(np.isnan(matrix), _UNDEFINED, np.rint(np.clip(np.nan_to_num(matrix), 0, 1) * _SCALE))
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()


def _mean_of_known(values: Sequence[np.ndarray | None], weights: np.ndarray) -> list[float] | None:
    known = [i for i, value in enumerate(values) if value is not None]
    return _mean([values[i] for i in known], weights[known]).tolist() if known else None


def _mean(arrays: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Weighted mean, entry by entry over what is defined."""
    stacked = np.ma.masked_invalid(np.stack(arrays).astype(np.float64))
    return np.ma.average(stacked, axis=0, weights=weights).filled(np.nan)
