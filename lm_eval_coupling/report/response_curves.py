"""Coupling along what a model wrote: means over documents, right and wrong answers apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.saved.saved_table import SavedTable

ANSWERS = {True: "right", False: "wrong", None: "not scored"}
_BINS = 8
_COLUMNS = ("doc_hash", "kind", "ranks", "coupling", "part_index", "part_length")


def response_curves(
    table: SavedTable, answers: Mapping[str, Mapping[str, Any]], ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Average coupling over documents in bins of the position in the response.

    A document counts once in a bin, by the mean of its tokens there.

    Args:
        table: of one task.
        answers: the model's answers, by ``doc_hash``.
        ranks: numbers K of singular vectors.

    Returns:
        One curve per ``kind`` (part of the text), ``answer`` (`ANSWERS`) and ``rank``: ``share``
        (middle of the bin, 0 at the first token, 1 at the last), ``mean``, ``stderr`` and the
        number of documents ``n``, one value per bin with documents. Empty without such tokens.
    """
    if "part_index" not in table.columns:
        return []
    values: dict[tuple[str, str, int], dict[int, dict[str, list[float]]]] = {}
    rows = table.read(_COLUMNS, weights="trained", places="all").dropna(subset="part_index")
    for row in rows.to_dict("records"):
        answer = ANSWERS[answers.get(row["doc_hash"], {}).get("right")]
        share = row["part_index"] / max(row["part_length"] - 1, 1)
        place = min(int(share * _BINS), _BINS - 1)
        couplings = () if row["coupling"] is None else row["coupling"]
        for rank, coupling in zip(row["ranks"], couplings, strict=False):
            if rank in ranks:
                bins = values.setdefault((row["kind"], answer, int(rank)), {})
                bins.setdefault(place, {}).setdefault(row["doc_hash"], []).append(coupling)
    return [
        {"kind": kind, "answer": answer, "rank": str(rank)} | _curve(bins)
        for (kind, answer, rank), bins in sorted(values.items())
    ]


def _curve(bins: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, list[Any]]:
    means = {
        place: mean_and_error(mean_and_error(tokens)["mean"] for tokens in documents.values())
        for place, documents in sorted(bins.items())
    }
    defined = {place: mean for place, mean in means.items() if mean["n"]}
    curve: dict[str, list[Any]] = {"share": [(place + 0.5) / _BINS for place in defined]}
    return curve | {
        name: [mean[name] for mean in defined.values()] for name in ("mean", "stderr", "n")
    }
