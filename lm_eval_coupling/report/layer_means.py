"""Means over documents of matrices, profiles and norms, summed row by row to bound the memory."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

_SCALE, _UNDEFINED = 10_000, 0xFFFF
_AXES = {"jacobian": 1, "basis": 0}  # the axis of a matrix that a layer's profile averages over


class LayerMeans:
    """Mean matrices and norms of a table, and each layer's mean miscoupling with its error.

    A document's value is the mean over its prompts of what is defined. Errors are over documents.

    Args:
        ranks: numbers K to average.
        prompts: how many prompts each document has, so that all documents count alike.
    """

    def __init__(self, ranks: Sequence[int], prompts: Mapping[tuple[str, str], int]) -> None:
        self._prompts = prompts
        self._norms = _Mean()
        self._matrices = {rank: _Mean() for rank in ranks}
        self._profiles: dict[tuple[int, str], dict[tuple[str, str], _Mean]] = {
            (rank, side): {} for rank in ranks for side in _AXES
        }

    def add(self, rows: pd.DataFrame) -> None:
        """Add rows with ``doc_hash, prompt_hash, ranks, normalized_miscoupling, norms``."""
        for row in rows.to_dict("records"):
            document = row["doc_hash"], row["prompt_hash"]
            weight = 1 / self._prompts[document]
            self._norms.add(row["norms"], weight)
            matrices = row["normalized_miscoupling"]
            if matrices is None:
                continue
            for rank, matrix in zip(row["ranks"], matrices, strict=True):
                if rank in self._matrices:
                    self._matrices[rank].add(matrix, weight)
                    self._add_profiles(rank, document, matrix)

    def _add_profiles(self, rank: int, document: tuple[str, str], matrix: np.ndarray) -> None:
        pairs = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix.astype(np.float64))
        for side, axis in _AXES.items():
            profile = self._profiles[rank, side].setdefault(document, _Mean())
            profile.add(_nanmean(pairs, axis))

    def summary(self, *, matrices: bool) -> dict[str, Any]:
        """Return ``norms``, ``profile`` and, if asked for, the packed ``mean`` matrices.

        ``profile`` has by rank ``jacobian, basis`` and their ``_stderr``, each of one number per
        layer.
        """
        ranks = [rank for rank, mean in self._matrices.items() if mean.has_values]
        summary: dict[str, Any] = {
            "norms": self._norms.mean().tolist() if self._norms.has_values else None
        }
        if matrices:
            summary["mean"] = {rank: pack(self._matrices[rank].mean()) for rank in ranks}
        return summary | {"profile": {rank: self._summarize_profile(rank) for rank in ranks}}

    def _summarize_profile(self, rank: int) -> dict[str, list[float]]:
        profile = {}
        for side in _AXES:
            documents = np.stack([mean.mean() for mean in self._profiles[rank, side].values()])
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


class _Mean:
    """Weighted mean of arrays, entry by entry over what is defined."""

    def __init__(self) -> None:
        self.has_values = False
        self._total: np.ndarray | float = 0.0
        self._weight: np.ndarray | float = 0.0

    def add(self, array: np.ndarray | None, weight: float = 1.0) -> None:
        if array is not None:
            is_defined = np.isfinite(array)
            self._total = self._total + weight * np.where(is_defined, array, 0).astype(np.float64)
            self._weight = self._weight + weight * is_defined
            self.has_values = True

    def mean(self) -> np.ndarray:
        weight = np.asarray(self._weight)
        return np.where(weight > 0, self._total / np.where(weight > 0, weight, 1), np.nan)


def pack(matrix: Float[np.ndarray, "layer layer"]) -> str:
    """Pack a matrix of numbers from 0 to 1, in a third of the size of its digits.

    Returns:
        Base64 of little-endian 16-bit ten-thousandths, row by row; 65535 is undefined.
    """
    digits = np.rint(np.clip(np.nan_to_num(matrix), 0, 1) * _SCALE)
    digits = np.where(np.isnan(matrix), _UNDEFINED, digits)
    return base64.b64encode(digits.astype("<u2").tobytes()).decode()
