"""Headline number of a prompt, its value at chance, and the rank at which it is reported.

Coupling is 1 − the mean of m̃[layer, layer'] over different layers. NumPy only.

Chance is the expectation for a Gaussian K × K matrix A, which is what the coupling matrix of two
unrelated blocks tends to for d_model much larger than K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lm_eval_coupling.errors import whole


def headline_rank(ranks: Sequence[int]) -> int:
    """Return the K of the metric ``coupling``: 10 if it was measured, else the smallest."""
    return 10 if 10 in ranks else min(ranks)


def chance_level(rank: int) -> float:
    """Return the expected normalized miscoupling of unrelated layers, E m̃ of a Gaussian A.

    It is 0.9484 at K = 10. ‖Diag A‖² / ‖A‖² follows Beta(K/2, K(K − 1)/2). With a = K(K − 1)/2 and
    b = K²/2 hence E m̃ = Γ(a + 1/2) Γ(b) / (Γ(a) Γ(b + 1/2)). Earlier versions gave the root of the
    mean of m̃², √(1 − 1/K) = 0.9487, which is larger than the mean of m̃.

    Raises:
        CouplingError: if the rank is not a whole number from 1.
    """
    K = whole("rank", rank, 1)
    return _mean_root_of_beta(K * (K - 1) / 2, K / 2)


def chance_coupling(rank: int) -> float:
    """Return the expected coupling of unrelated layers: 0.0516 at K = 10.

    Earlier versions gave 1 − √(1 − 1/K) = 0.0513; see :func:`chance_level`.
    """
    return 1 - chance_level(rank)


def chance_rotated(rank: int) -> float:
    """Return the expected coupling of unrelated layers after a common rotation of both bases.

    A Gaussian A has three parts: antisymmetric, traceless symmetric, and trace. Their squared
    shares follow Dirichlet(K(K − 1)/4, (K(K + 1) − 2)/4, 1/2). The miscoupling is the root of
    antisymmetric + K/(K + 2) · symmetric. Its mean is E √Beta((K² − 1)/2, 1/2) times
    ₂F₁(−1/2, (K(K + 1) − 2)/4; (K² − 1)/2; 2/(K + 2)). NaN at K = 1.
    """
    K = whole("rank", rank, 1)
    if K == 1:
        return math.nan
    symmetric, both = (K * (K + 1) - 2) / 4, (K * K - 1) / 2
    term = total = 1.0
    for n in range(60):  # The ratio of terms is below 1/2.
        term *= (n - 0.5) * (symmetric + n) / ((both + n) * (n + 1)) * 2 / (K + 2)
        total += term
    return 1 - _mean_root_of_beta(both, 0.5) * total


def chance_one_pair(rank: int) -> float:
    """Return the expected share of the first of K² entries of unrelated layers: 1/K²."""
    return 1 / whole("rank", rank, 1) ** 2


def _mean_root_of_beta(a: float, b: float) -> float:
    """Return E √X for X ~ Beta(a, b)."""
    return _gamma_ratio(a) / _gamma_ratio(a + b)


def _gamma_ratio(x: float) -> float:
    """Return Γ(x + 1/2) / Γ(x)."""
    if x == 0:
        return 0.0
    if x > 1e4:  # Differences of large logarithms lose digits.
        return math.sqrt(x) * (1 - 1 / (8 * x) + 1 / (128 * x * x))
    return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))


def mean_off_diagonal(pairs: Float[np.ndarray, "layer layer"], diagonal: bool = False) -> float:
    """Return the float64 mean of the defined values over l ≠ l'; NaN where there are none.

    Args:
        pairs: values of all pairs of layers.
        diagonal: include l = l'.
    """
    chosen = ~np.isnan(pairs) & (diagonal | ~np.eye(len(pairs), dtype=bool))
    return float(pairs[chosen].astype(np.float64).mean()) if chosen.any() else math.nan


def coupling_of(
    normalized_miscoupling: Float[np.ndarray, "layer layer"], diagonal: bool = False
) -> float:
    """Return 1 − the mean of m̃[layer, layer'] over different layers; NaN if undefined.

    Args:
        normalized_miscoupling: m̃ of all pairs of layers.
        diagonal: include l = l'.
    """
    return 1 - mean_off_diagonal(normalized_miscoupling, diagonal)


def couplings_of(
    normalized_miscoupling: Float[np.ndarray, "rank layer layer"] | None,
) -> list[float] | None:
    """Return :func:`coupling_of` at every rank; None for None."""
    if normalized_miscoupling is None:
        return None
    return [coupling_of(matrix) for matrix in normalized_miscoupling]
