"""Miscoupling of pairs of tokens: self-coupling, and context coupling with the input or the output token fixed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import nanmean
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.tables import require


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of token-wise coupling and where the records have it."""

    label: str
    column: str
    tokens: str
    layers: str


KINDS = {
    "self": Kind("self-coupling", "self_miscoupling", "self_tokens", "self_layers"),
    "context_input": Kind(
        "context coupling, input token fixed",
        "context_input_miscoupling",
        "context_tokens",
        "context_layers",
    ),
    "context_output": Kind(
        "context coupling, output token fixed",
        "context_output_miscoupling",
        "context_tokens",
        "context_layers",
    ),
}


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """m̃[layer, layer', token, token'] averaged over ``n`` prompts, layers counted from 1.

    ``tokens`` are positions as in the records or, where these differ, from the end of the prompt (-1 is the last).
    """

    miscoupling: np.ndarray
    layers: list[int]
    tokens: list[int]
    n: int

    def rows(self) -> pd.DataFrame:
        """One row for every pair of layers and tokens."""
        a, b, t, s = (index.ravel() for index in np.indices(self.miscoupling.shape))
        layers, tokens = np.array(self.layers), np.array(self.tokens)
        places = {
            "jacobian_layer": layers[a],
            "basis_layer": layers[b],
            "jacobian_token": tokens[t],
            "basis_token": tokens[s],
        }
        return pd.DataFrame(places | {"miscoupling": self.miscoupling.ravel(), "n": self.n})

    def by_layers(self) -> np.ndarray:
        """m̃[layer, layer'] averaged over pairs of different tokens; NaN where none is defined."""
        different = ~np.eye(len(self.tokens), dtype=bool)
        return nanmean(np.moveaxis(self.miscoupling[..., different], -1, 0))


def token_pairs(records: pd.DataFrame, kind: str, rank: int) -> TokenPairs:
    """The mean over prompts of one kind of token-wise miscoupling.

    Args:
        records: of one run and its weights.
        kind: one of ``KINDS``.
        rank: number K of singular vectors.

    Returns:
        The mean, with the layers and tokens that it is of and the number of prompts.

    Raises:
        CouplingError: if it was not recorded, or prompts differ in layers or number of tokens, so that there is no mean.
    """
    where = KINDS[kind]
    records = require(records, [where.column])
    layers = {tuple(record) for record in records[where.layers]}
    numbers = {len(tokens) for tokens in records[where.tokens]}
    if len(layers) > 1 or len(numbers) > 1:
        what = (
            f"layers {sorted(layers)}"
            if len(layers) > 1
            else f"{min(numbers)} to {max(numbers)} tokens"
        )
        raise CouplingError(
            f"got prompts with {what} for {where.label}, expected the same in all; choose one with --doc"
        )
    positions = [tuple(tokens) for tokens in records[where.tokens]]
    if len(set(positions)) > 1:
        positions = [
            tuple(t - n for t in tokens)
            for tokens, n in zip(records[where.tokens], records["n_tokens"], strict=True)
        ]
    if len(set(positions)) > 1:  # sampled: places mean something in one prompt only
        positions = [tuple(range(1, numbers.pop() + 1))]
    values = [
        array[list(ranks).index(rank)].astype(np.float64)
        for array, ranks in zip(records[where.column], records["ranks"], strict=True)
    ]
    return TokenPairs(
        nanmean(np.stack(values)),
        [layer + 1 for layer in layers.pop()],
        list(positions[0]),
        len(values),
    )
