"""Spread of representations over documents: decay of their variances, and their number. NumPy."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

FEWEST = 20  # documents; below, the variances between first and last are too few for a line
_FIRST = 4  # variance from which on the line is fitted: the first few are often outliers


def variances(X: Float[np.ndarray, "document dimension"]) -> Float[np.ndarray, " variance"]:
    """Return the eigenvalues of the covariance over documents, largest first.

    There are min(n − 1, d) of them: the others are zero.
    """
    centered = np.asarray(X, dtype=np.float64) - np.mean(X, axis=0, dtype=np.float64)
    # The smaller of the two Gram matrices has the same eigenvalues.
    gram = centered @ centered.T if len(X) <= X.shape[1] else centered.T @ centered
    values = np.linalg.eigvalsh(gram)[::-1][: min(len(X) - 1, X.shape[1])]
    return np.maximum(values, 0) / len(X)


def alpha_req(X: Float[np.ndarray, "document dimension"]) -> float:
    """Return α of λ_i ∝ i^−α, the decay of the variances (α-ReQ, Agrawal et al., 2022).

    The slope is that of least squares in log λ over log i, for i from 4 to half of their number:
    the first are often outliers, and the last are too small in a sample. It is NaN where one of
    these variances is zero or not finite.
    """
    if not np.isfinite(X).all():
        return math.nan
    values = variances(X)
    chosen = values[_FIRST - 1 : len(values) // 2]
    if len(chosen) < 2 or chosen[-1] <= 1e-12 * values[0]:
        return math.nan
    x, y = np.log(np.arange(len(chosen)) + _FIRST), np.log(chosen)
    x = x - x.mean()
    return -float(x @ y / (x @ x))


def rank_me(X: Float[np.ndarray, "document dimension"]) -> float:
    """Return exp of the entropy of σ / Σσ, the singular values of X unchanged (RankMe).

    It is n for n equal singular values (Garrido et al., arXiv 2210.02885), and NaN where X is zero
    or not finite.
    """
    if not np.isfinite(X).all():
        return math.nan
    values = np.linalg.svd(np.asarray(X, dtype=np.float64), compute_uv=False)
    if not values[0] > 0:
        return math.nan
    shares = values / values.sum()
    shares = shares[shares > 0]
    return math.exp(-float(shares @ np.log(shares)))
