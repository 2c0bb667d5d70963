"""Simulated models and answers of known truth, for the size and coverage of statistics."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats


def skewed(values, data):
    """Return normal values as they are, or as a lognormal sample."""
    return np.exp(values) if data == "lognormal" else values


def families(number, kind="unequal"):
    """Return the family of each model: 4 models each, or 1 to 8 of them."""
    sizes = [4] * number if kind == "equal" else [1 + (i * 7) % 8 for i in range(number)]
    return np.repeat(np.arange(number), sizes)


def pairs(rng, n, rho, data="normal"):
    """Draw n pairs; of lognormal pairs rho is the correlation of their logarithms."""
    x = rng.normal(size=n)
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)
    return skewed(x, data), skewed(y, data)


def true_correlation(rho, data):
    """Return the correlation of the pairs themselves."""
    return rho if data == "normal" else math.expm1(rho) / math.expm1(1)


def in_families(rng, family, rho=0.0, share=0.5, data="normal"):
    """Draw pairs of which ``share`` of the variance lies between families."""
    number = family.max() + 1
    between, within = pairs(rng, number, rho), pairs(rng, len(family), rho)
    return tuple(
        skewed(math.sqrt(share) * b[family] + math.sqrt(1 - share) * w, data)
        for b, w in zip(between, within, strict=True)
    )


def three(rng, n, first, second, between, data="normal"):
    """Draw a score and two predictors with these correlations."""
    matrix = np.array([[1, first, second], [first, 1, between], [second, between, 1]])
    return tuple(skewed(v, data) for v in np.linalg.cholesky(matrix) @ rng.normal(size=(3, n)))


def answers(rng, models, documents, shift=0.0, data="normal"):
    """Draw answers of several models to the same documents.

    Models agree on which documents are hard and which are coupled; right answers have values that
    are larger by ``shift`` standard deviations.
    """
    hard, coupled = rng.normal(size=(2, documents))
    frames = []
    for model in range(models):
        right = 0.9 * hard + 0.45 * rng.normal(size=documents) > 0
        value = 0.9 * coupled + math.sqrt(0.19) * rng.normal(size=documents) + shift * right
        frames.append(
            pd.DataFrame(
                {"value": skewed(value, data), "right": right.astype(int), "model": f"m{model}"}
            )
        )
    document = np.tile(np.arange(documents), models)
    return pd.concat(frames, ignore_index=True).assign(
        document=document, task=np.where(document % 2, "odd", "even")
    )


def true_area(shift):
    """Return the AUROC of answers with this shift."""
    return float(stats.norm.cdf(shift / math.sqrt(2)))
