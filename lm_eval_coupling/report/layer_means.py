"""Means over documents of what has layers, added up row by row so that no more than a few matrices are held."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

_SCALE, _UNDEFINED = 10_000, 0xFFFF
_SIDES = {"jacobian": 1, "basis": 0}  # the axis that is averaged over


class Layers:
    """Mean matrices and norms of a table's documents, and each layer's mean miscoupling with the others, with its error.

    A document's value is the mean over its prompts of what is defined; tables are a sample of documents.
    """

    def __init__(self, ranks: Sequence[int], prompts: Mapping[tuple[str, str], int]) -> None:
        """``prompts``: how many each document has, so that documents count alike."""
        self._prompts = prompts
        self._matrices: dict[int, _Mean] = {rank: _Mean() for rank in ranks}
        self._profiles: dict[tuple[int, str], dict[Any, _Mean]] = {
            (k, of): {} for k in ranks for of in ("jacobian", "basis")
        }
        self._norms = _Mean()

    def add(self, rows: pd.DataFrame) -> None:
        """Rows with ``doc_hash, prompt_hash, ranks, normalized_miscoupling, norms``."""
        for row in rows.to_dict("records"):
            document = row["doc_hash"], row["prompt_hash"]
            weight = 1 / self._prompts[document]
            self._norms.add(row["norms"], weight)
            measured = row["normalized_miscoupling"]
            for rank, matrix in (
                zip(row["ranks"], measured, strict=True) if measured is not None else ()
            ):
                if rank not in self._matrices:
                    continue
                self._matrices[rank].add(matrix, weight)
                pairs = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix.astype(np.float64))
                for of, axis in _SIDES.items():
                    self._profiles[rank, of].setdefault(document, _Mean()).add(
                        _nanmean(pairs, axis)
                    )

    def summary(self, *, matrices: bool) -> dict[str, Any]:
        """``norms``, ``profile`` (by rank: ``jacobian, basis`` and their ``_stderr``) and, if asked for, packed ``mean``."""
        found: dict[str, Any] = {
            "norms": self._norms.mean().tolist() if self._norms.known else None
        }
        if matrices:
            found["mean"] = {
                k: pack(mean.mean()) for k, mean in self._matrices.items() if mean.known
            }
        found["profile"] = {k: self._profile(k) for k, mean in self._matrices.items() if mean.known}
        return found

    def _profile(self, rank: int) -> dict[str, list[float]]:
        found = {}
        for of in _SIDES:
            documents = np.stack([mean.mean() for mean in self._profiles[rank, of].values()])
            n = np.isfinite(documents).sum(axis=0)
            center = _nanmean(documents, 0)
            squares = np.nansum((documents - center) ** 2, axis=0)
            found[of] = center.tolist()
            found[f"{of}_stderr"] = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1), where=n > 1,
                                            out=np.full(len(n), np.nan)).tolist()  # fmt: skip
        return found


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    n = np.isfinite(values).sum(axis=axis)
    return np.where(n, np.nansum(values, axis=axis) / np.maximum(n, 1), np.nan)


class _Mean:
    """Weighted mean of arrays, entry by entry over what is defined."""

    def __init__(self) -> None:
        self.known = False
        self._total: np.ndarray | float = 0.0
        self._count: np.ndarray | float = 0.0

    def add(self, array: np.ndarray | None, weight: float = 1.0) -> None:
        if array is not None:
            defined = np.isfinite(array)
            self._total = self._total + weight * np.where(defined, array, 0).astype(np.float64)
            self._count = self._count + weight * defined
            self.known = True

    def mean(self) -> np.ndarray:
        count = np.asarray(self._count)
        return np.where(count > 0, self._total / np.where(count > 0, count, 1), np.nan)


def pack(matrix: Float[np.ndarray, "layer layer"]) -> str:
    """Base64 of little-endian 16-bit ten-thousandths, row by row; 65535 is undefined. A third of the size of digits."""
    whole = np.where(
        np.isnan(matrix), _UNDEFINED, np.rint(np.clip(np.nan_to_num(matrix), 0, 1) * _SCALE)
    )
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()
