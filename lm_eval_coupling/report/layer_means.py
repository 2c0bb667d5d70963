"""Means over documents of matrices, profiles and norms, summed row by row to bound the memory."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# Columns of a table that means over documents are of.
LAYERS = ("doc_hash", "prompt_hash", "ranks", "normalized_miscoupling", "norms")
_SCALE, _UNDEFINED = 10_000, 0xFFFF
_AXES = {"jacobian": 1, "basis": 0}  # the axis of a matrix that a layer's profile averages over


class LayerMeans:
    """Mean matrices and norms of a table, and each layer's mean miscoupling with its error.

    A document's value is the mean over its prompts, undefined where it is in one of them. Means and
    errors are over documents.

    Args:
        ranks: numbers K to average.
        prompts: how many prompts each document has.
    """

    def __init__(self, ranks: Sequence[int], prompts: Mapping[tuple[str, str], int]) -> None:
        self._norms = _Mean()
        self._matrices = {rank: _Mean() for rank in ranks}
        self._profiles: dict[tuple[int, str], list[np.ndarray]] = {
            (rank, side): [] for rank in ranks for side in _AXES
        }
        self._norms_of_documents = _DocumentMeans(prompts)
        self._matrices_of_documents = {rank: _DocumentMeans(prompts) for rank in ranks}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row with the columns ``LAYERS``."""
        document = row["doc_hash"], row["prompt_hash"]
        norms = self._norms_of_documents.add(document, row["norms"])
        if norms is not None:
            self._norms.add(norms)
        matrices = row["normalized_miscoupling"]
        of_rank = {} if matrices is None else dict(zip(row["ranks"], matrices, strict=True))
        for rank, documents in self._matrices_of_documents.items():
            matrix = documents.add(document, of_rank.get(rank))
            if matrix is not None:
                self._matrices[rank].add(matrix)
                self._add_profiles(rank, matrix)

    def _add_profiles(self, rank: int, matrix: np.ndarray) -> None:
        pairs = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        for side, axis in _AXES.items():
            self._profiles[rank, side].append(_nanmean(pairs, axis))

    def summary(self, *, matrices: bool) -> dict[str, Any]:
        """Return ``norms``, ``profile`` and, if asked for, ``mean`` and ``measured``.

        ``mean`` has the packed matrices by rank, and ``measured`` is the number of documents behind
        them. ``profile`` has by rank ``jacobian, basis`` and their ``_stderr``, each of one number
        per layer.
        """
        ranks = [rank for rank, mean in self._matrices.items() if mean.count]
        summary: dict[str, Any] = {
            "norms": self._norms.mean().tolist() if self._norms.count else None
        }
        if matrices:
            summary["mean"] = {rank: pack(self._matrices[rank].mean()) for rank in ranks}
            summary["measured"] = max((self._matrices[rank].count for rank in ranks), default=0)
        return summary | {"profile": {rank: self._summarize_profile(rank) for rank in ranks}}

    def _summarize_profile(self, rank: int) -> dict[str, list[float]]:
        profile = {}
        for side in _AXES:
            documents = np.stack(self._profiles[rank, side])
            n = np.isfinite(documents).sum(axis=0)
            center = _nanmean(documents, 0)
            squares = np.nansum((documents - center) ** 2, axis=0)
            variance = squares / np.maximum(n - 1, 1) / np.maximum(n, 1)
            profile[side] = center.tolist()
            profile[f"{side}_stderr"] = np.where(n > 1, np.sqrt(variance), np.nan).tolist()
        return profile


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    n = np.isfinite(values).sum(axis=axis)
    return np.where(n, np.nansum(values, axis=axis) / np.maximum(n, 1), np.nan)


class _DocumentMeans:
    """Means over the prompts of each document, given out when a document is complete.

    Only documents of which a prompt is still to come are held.
    """

    def __init__(self, prompts: Mapping[tuple[str, str], int]) -> None:
        self._prompts = prompts
        self._begun: dict[tuple[str, str], list[np.ndarray | None]] = {}

    def add(self, document: tuple[str, str], array: np.ndarray | None) -> np.ndarray | None:
        """Add a prompt's array; None if the prompt has none.

        Returns:
            The document's mean in float64 after its last prompt, else None. None as well if one of
            its prompts has no array; NaN where one of them is undefined.
        """
        arrays = self._begun.setdefault(document, [])
        arrays.append(array)
        if len(arrays) < self._prompts[document]:
            return None
        defined = [a for a in self._begun.pop(document) if a is not None]
        if len(defined) < self._prompts[document]:
            return None
        return np.asarray(np.mean(np.stack(defined), axis=0, dtype=np.float64))


class _Mean:
    """Mean of arrays, entry by entry over what is defined."""

    def __init__(self) -> None:
        self.count = 0
        self._total: np.ndarray | float = 0.0
        self._n: np.ndarray | int = 0

    def add(self, array: np.ndarray) -> None:
        is_defined = np.isfinite(array)
        self._total = self._total + np.where(is_defined, array, 0)
        self._n = self._n + is_defined
        self.count += 1

    def mean(self) -> np.ndarray:
        n = np.asarray(self._n)
        return np.where(n > 0, self._total / np.maximum(n, 1), np.nan)


def pack(matrix: Float[np.ndarray, "layer layer"]) -> str:
    """Pack a matrix of numbers from 0 to 1, in a third of the size of its digits.

    Returns:
        Base64 of little-endian 16-bit ten-thousandths, row by row; 65535 is undefined.
    """
    digits = np.rint(np.clip(np.nan_to_num(matrix), 0, 1) * _SCALE)
    digits = np.where(np.isnan(matrix), _UNDEFINED, digits)
    return base64.b64encode(digits.astype("<u2").tobytes()).decode()
