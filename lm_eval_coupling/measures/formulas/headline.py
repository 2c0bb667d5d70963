"""The one number of a prompt, what chance makes of it, and at which rank it is reported. NumPy only.

Coupling is 1 − the mean of m̃[layer, layer'] over different layers. Whatever reads, draws or reports it takes it from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lm_eval_coupling.errors import whole


def headline_rank(ranks: Sequence[int]) -> int:
    """The K of the metric ``coupling``: 10 whenever it was measured, else the smallest. Never mixed with another K."""
    return 10 if 10 in ranks else min(ranks)


def chance_level(rank: int) -> float:
    """Return √(1 − 1/K), the normalised miscoupling of any A under random pairing of its left with its right indices.

    Exactly: the mean of m̃² over all K! pairings is 1 − 1/K.

    Raises:
        CouplingError: if the rank is no whole number from 1.
    """
    return math.sqrt(1 - 1 / whole("rank", rank, 1))


def chance_coupling(rank: int) -> float:
    """Return 1 − √(1 − 1/K), the coupling of unrelated layers."""
    return 1 - chance_level(rank)


def mean_off_diagonal(pairs: Float[np.ndarray, "layer layer"], diagonal: bool = False) -> float:
    """Mean over l ≠ l' (with ``diagonal``, over all pairs) of what is defined, in float64; NaN where nothing is."""
    wanted = ~np.isnan(pairs) if diagonal else ~np.isnan(pairs) & ~np.eye(len(pairs), dtype=bool)
    return float(pairs[wanted].astype(np.float64).mean()) if wanted.any() else math.nan


def coupling_of(
    normalized_miscoupling: Float[np.ndarray, "layer layer"], diagonal: bool = False
) -> float:
    """1 − the mean of m̃[layer, layer'] over different layers (with ``diagonal``, over all pairs); NaN if undefined."""
    return 1 - mean_off_diagonal(normalized_miscoupling, diagonal)


def couplings_of(
    normalized_miscoupling: Float[np.ndarray, "rank layer layer"] | None,
) -> list[float] | None:
    """:func:`coupling_of` at every rank; ``None`` of nothing."""
    return (
        None
        if normalized_miscoupling is None
        else [coupling_of(matrix) for matrix in normalized_miscoupling]
    )
