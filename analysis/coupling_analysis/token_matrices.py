"""Coupling matrices of one prompt, measured anew: records hold only what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import block_jacobians, resolve_token
from lm_eval_coupling.measures.formulas.miscoupling import coupling_matrices
from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.numerics.spectra import top_singular

ACROSS = {
    "layers": "J_tt of different layers",
    "self": "J_tt of different tokens",
    "context_input": "J of one input token and different output tokens",
    "context_output": "J of different input tokens and one output token",
}


@dataclasses.dataclass(frozen=True)
class Matrices:
    """A[i, i'] = U_{i'}ᵀ J_i V_{i'} of several Jacobians, their names and their largest singular values ``scale``."""

    A: np.ndarray
    scale: np.ndarray
    names: list[str]
    about: str

    def rows(self) -> pd.DataFrame:
        """One row for every entry."""
        a, b, i, j = (index.ravel() for index in np.indices(self.A.shape))
        names = np.array(self.names)
        places = {"jacobian": names[a], "basis": names[b], "i": i + 1, "j": j + 1}
        return pd.DataFrame(places | {"value": self.A.ravel(), "sigma_1": self.scale[a]})


def load(name: str, untrained: int | None = None, dtype: str = "auto") -> Any:
    """The model of a transformers folder or name, wrapped; with a seed, of its architecture with fresh float32 weights.

    Args:
        name: for transformers.
        untrained: the seed.
        dtype: of the weights, such as ``float32``; by default as they are stored.

    Returns:
        A :class:`~lm_eval_coupling.residual.ResidualModel`.

    Raises:
        CouplingError: if there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lm_eval_coupling.residual import ResidualModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if untrained is None:
            return ResidualModel.wrap(
                AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
            )
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CouplingError(
            f"got {name}, which transformers cannot load ({reason}); give a folder with its tokenizer"
        ) from None
    with seeded(untrained):
        return ResidualModel.wrap(
            AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
        )


def of_layers(
    model: Any, ids: Sequence[int], layers: Sequence[int] | None, token: int, rank: int
) -> Matrices:
    """Of the blocks ``layers`` (counted from 1; four by default) at one token.

    Returns:
        The coupling matrix of every pair of these blocks: one's Jacobian in the other's singular vectors.

    Raises:
        CouplingError: if there is no such layer, token or rank.
    """
    chosen = list(
        layers or np.unique(np.linspace(1, model.n_layers, 4).round().astype(int)).tolist()
    )
    _check_layers(chosen, model)
    found = block_jacobians(
        model, torch.tensor([ids]), output_token=token, layers=[layer - 1 for layer in chosen]
    )
    place = resolve_token(token, len(ids)) + 1
    return _matrices(
        found.jacobians,
        [f"layer {layer}" for layer in chosen],
        rank,
        f"token {place} of {len(ids)}",
    )


def of_tokens(
    model: Any, ids: Sequence[int], layer: int | None, tokens: Sequence[int], rank: int, across: str
) -> Matrices:
    """Of one block at several tokens; ``across`` says which of a Jacobian's two tokens differ, see ``ACROSS``.

    The fixed input token is the first of ``tokens``, the fixed output token the last.

    Returns:
        The coupling matrix of every pair of these tokens: one's Jacobian in the other's singular vectors.

    Raises:
        CouplingError: if there is no such layer, token or rank.
    """
    layer = layer or (model.n_layers + 1) // 2
    _check_layers([layer], model)
    tokens = sorted(resolve_token(token, len(ids)) for token in tokens)
    pairs = {
        "self": [(t, t) for t in tokens],
        "context_input": [(tokens[0], t) for t in tokens],
        "context_output": [(t, tokens[-1]) for t in tokens],
    }[across]
    J = [
        block_jacobians(
            model, torch.tensor([ids]), input_token=i, output_token=o, layers=[layer - 1]
        ).jacobians[0]
        for i, o in pairs
    ]
    names = [f"token {o + 1}" if across == "self" else f"token {i + 1} → {o + 1}" for i, o in pairs]
    return _matrices(torch.stack(J), names, rank, f"{ACROSS[across]}, layer {layer}")


def _check_layers(layers: Sequence[int], model: Any) -> None:
    if bad := [layer for layer in layers if not 1 <= layer <= model.n_layers]:
        raise CouplingError(f"got layer {bad[0]}, expected 1 to {model.n_layers}")


def _matrices(J: torch.Tensor, names: list[str], rank: int, about: str) -> Matrices:
    triplets = top_singular(J, rank)
    A = coupling_matrices(J, triplets.U, triplets.V)
    return Matrices(A.cpu().double().numpy(), triplets.S[:, 0].cpu().double().numpy(), names, about)
