"""Miscoupling of pairs of tokens, averaged over prompts.

There are three kinds: self-coupling, and context coupling with the input or the output token fixed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import nanmean
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.tables import require


@dataclasses.dataclass(frozen=True)
class TokenPairKind:
    """A kind of token-wise coupling, and the columns of the records that hold it."""

    label: str
    column: str
    tokens: str
    layers: str


KINDS = {
    "self": TokenPairKind("self-coupling", "self_miscoupling", "self_tokens", "self_layers"),
    "context_input": TokenPairKind(
        "context coupling, input token fixed",
        "context_input_miscoupling",
        "context_tokens",
        "context_layers",
    ),
    "context_output": TokenPairKind(
        "context coupling, output token fixed",
        "context_output_miscoupling",
        "context_tokens",
        "context_layers",
    ),
}


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Mean miscoupling m̃[layer, layer', token, token'] of ``n`` prompts; layers count from 1.

    ``tokens`` are positions as recorded, if all prompts have the same. Otherwise they count from
    the end of the prompt, where -1 is the last.
    """

    miscoupling: np.ndarray
    layers: list[int]
    tokens: list[int]
    n: int

    def rows(self) -> pd.DataFrame:
        """Return one row per pair of layers and pair of tokens."""
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
        """Return m̃[layer, layer'], averaged over pairs of different tokens."""
        is_different = ~np.eye(len(self.tokens), dtype=bool)
        return nanmean(np.moveaxis(self.miscoupling[..., is_different], -1, 0))


def mean_token_pairs(records: pd.DataFrame, kind: str, rank: int) -> TokenPairs:
    """Average one kind of token-wise miscoupling over prompts.

    Args:
        records: of one run and its weights.
        kind: key of ``KINDS``.
        rank: number K of singular vectors.

    Returns:
        The mean, its layers and tokens, and the number of prompts.

    Raises:
        CouplingError: if it was not recorded, or if prompts differ in layers or number of tokens.
    """
    names = KINDS[kind]
    records = require(records, [names.column])
    layers = {tuple(of_prompt) for of_prompt in records[names.layers]}
    numbers = {len(tokens) for tokens in records[names.tokens]}
    if len(layers) > 1 or len(numbers) > 1:
        of_layers, of_tokens = (
            f"layers {sorted(layers)}",
            f"{min(numbers)} to {max(numbers)} tokens",
        )
        raise CouplingError(
            f"got prompts with {of_layers if len(layers) > 1 else of_tokens} for {names.label}, "
            "expected the same in all; choose one with --doc"
        )
    values = [
        array[list(ranks).index(rank)].astype(np.float64)
        for array, ranks in zip(records[names.column], records["ranks"], strict=True)
    ]
    tokens = _shared_positions(records[names.tokens], records["n_tokens"])
    blocks = layers.pop()
    return TokenPairs(nanmean(np.stack(values)), [b + 1 for b in blocks], tokens, len(values))


def _shared_positions(positions: pd.Series, lengths: pd.Series) -> list[int]:
    """Return positions that fit all prompts: from the start, else from the end, else 1, 2, …."""
    from_start = {tuple(of_prompt) for of_prompt in positions}
    from_end = {
        tuple(token - length for token in of_prompt)
        for of_prompt, length in zip(positions, lengths, strict=True)
    }
    for shared in (from_start, from_end):
        if len(shared) == 1:
            return list(shared.pop())
    # Sampled tokens: a position has a meaning in its own prompt only.
    return list(range(1, len(positions.iloc[0]) + 1))
