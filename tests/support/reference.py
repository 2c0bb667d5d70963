"""Naive float64 oracles from the definitions, one number at a time, without package code."""

import itertools
import math

import numpy as np
from scipy import integrate, stats


def _array(x):
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def top_singular(J, k):
    """U[d, k], S[k], V[d, k] of one matrix, by a full float64 SVD."""
    U, S, Vt = np.linalg.svd(_array(J))
    return U[:, :k], S[:k], Vt[:k].T


def residual(J, U, S, V):
    J, U, S, V = map(_array, (J, U, S, V))
    worst = 0.0
    for i in range(len(S)):
        worst = max(
            worst,
            np.linalg.norm(J @ V[:, i] - S[i] * U[:, i]),
            np.linalg.norm(J.T @ U[:, i] - S[i] * V[:, i]),
        )
    return worst / S[0] if S[0] > 0 else worst


def relative_gap(S, k):
    S = _array(S)
    return (S[k - 1] - S[k]) / S[k - 1] if k < len(S) and S[k - 1] > 0 else math.nan


def coupling_matrix(J1, U2, V2):
    J1, U2, V2 = map(_array, (J1, U2, V2))
    k = U2.shape[1]
    A = np.zeros((k, k))
    for i in range(k):
        for j in range(k):
            A[i, j] = U2[:, i] @ (J1 @ V2[:, j])
    return A


def coupling_matrices(J, U, V):
    return np.array(
        [[coupling_matrix(J[a], U[b], V[b]) for b in range(len(U))] for a in range(len(J))]
    )


def miscoupling(A, normalized=False):
    A = _array(A)
    off = everything = 0.0
    for i in range(len(A)):
        for j in range(len(A)):
            everything += A[i, j] ** 2
            off += A[i, j] ** 2 if i != j else 0.0
    if not normalized:
        return math.sqrt(off)
    return math.sqrt(off) / math.sqrt(everything) if everything > 0 else math.nan


def miscoupling_to(A, S1, p=2.0, absolute=False, norm="p"):
    A, S1 = _array(A), _array(S1)
    total = 0.0
    for i in range(len(A)):
        for j in range(len(A)):
            entry = abs(A[i, j]) if absolute else A[i, j]
            total += (entry - (S1[i] if i == j else 0.0)) ** 2
    if norm == "trace":
        size = sum(S1)
    elif math.isinf(p):
        size = max(abs(s) for s in S1)
    else:
        size = sum(abs(s) ** p for s in S1) ** (1 / p)
    return math.sqrt(total) / size if size > 0 else math.nan


def subspace_overlap(U1, U2):
    U1, U2 = _array(U1), _array(U2)
    k = U1.shape[1]
    return sum((U2[:, i] @ U1[:, j]) ** 2 for i in range(k) for j in range(k)) / k


def mean_over_pairs(M, diagonal=False):
    M = _array(M)
    kept = [
        M[i, j]
        for i in range(len(M))
        for j in range(len(M))
        if (diagonal or i != j) and not math.isnan(M[i, j])
    ]
    return sum(kept) / len(kept) if kept else math.nan


def mean_squared_miscoupling_over_pairings(A):
    """Mean of m̃² over every way of pairing the left with the right indices of A."""
    A = _array(A)
    pairings = list(itertools.permutations(range(len(A))))
    return sum(miscoupling(A[:, list(order)], normalized=True) ** 2 for order in pairings) / len(
        pairings
    )


def expected_miscoupling(k):
    """Mean of √(1 − B) for B ~ Beta(K/2, K(K − 1)/2), by numerical integration."""
    b = stats.beta(k / 2, k * (k - 1) / 2)
    low, high = b.ppf(1e-15), b.isf(1e-15)
    return integrate.quad(lambda x: math.sqrt(1 - x) * b.pdf(x), low, high, limit=200)[0]


def _mean(values):
    return sum(values) / len(values)


def _variance(values):
    mean = _mean(values)
    return _mean([(v - mean) ** 2 for v in values])


def norms(x):
    return [math.sqrt(sum(c * c for c in point)) for point in _array(x)]


def step_lengths(x):
    x = _array(x)
    return norms([x[i] - x[i - 1] for i in range(1, len(x))])


def equidistance(x):
    lengths = step_lengths(x)
    return math.sqrt(_variance(lengths)) / _mean(lengths) if _mean(lengths) > 0 else math.nan


def line_shape_score(x):
    x, lengths = _array(x), step_lengths(x)
    if min(lengths) == 0:
        return math.nan
    end = start = x[0]
    for i in range(1, len(x)):
        end = end + (x[i] - x[i - 1]) / lengths[i - 1]
    distance = np.linalg.norm(end - start)
    return len(lengths) / distance if distance > 0 else math.nan


def expodistance(x):
    size = norms(x)
    if min(size) == 0:
        return math.nan
    alpha = [math.log(size[i] / size[i - 1]) for i in range(1, len(size))]
    return _variance(alpha) / _mean(alpha) ** 2 if _mean(alpha) != 0 else math.nan


def windowed(measure, x, window):
    """The measure on every run of `window` consecutive steps."""
    x = _array(x)
    return [measure(x[i : i + window + 1]) for i in range(len(x) - window)]
