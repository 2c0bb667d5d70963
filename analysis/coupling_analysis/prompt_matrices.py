"""Coupling matrices of one prompt, computed from the model: saved records only hold their norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, resolve_token
from lm_eval_coupling.jacobians.engine import block_jacobians
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
class CouplingMatrices:
    """Coupling matrices of every ordered pair of several Jacobians.

    ``A[i, j] = U_jᵀ J_i V_j``: [jacobian basis rank rank]. ``scale[i]`` is σ_1 of J_i. ``names``
    are those of the Jacobians; ``about`` says where they were taken, for the title of a picture.
    """

    A: np.ndarray
    scale: np.ndarray
    names: list[str]
    about: str

    def rows(self) -> pd.DataFrame:
        """Return one row per entry: ``jacobian, basis, i, j, value, sigma_1``."""
        a, b, i, j = (index.ravel() for index in np.indices(self.A.shape))
        names = np.array(self.names)
        places = {"jacobian": names[a], "basis": names[b], "i": i + 1, "j": j + 1}
        return pd.DataFrame(places | {"value": self.A.ravel(), "sigma_1": self.scale[a]})


def load_model(name: str, untrained: int | None = None, dtype: str = "auto") -> Any:
    """Load a transformers model and wrap it as a residual stream.

    Args:
        name: folder or name for transformers.
        untrained: seed of fresh float32 weights; None loads the trained ones.
        dtype: dtype of the trained weights, such as ``float32``; ``auto`` keeps the stored one.

    Returns:
        A :class:`~lm_eval_coupling.residual.ResidualModel`.

    Raises:
        CouplingError: if transformers cannot load the model.
    """
    from lm_eval_coupling.residual import ResidualModel

    return ResidualModel.wrap(*load_causal_lm(name, untrained, dtype))


def load_causal_lm(name: str, untrained: int | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a transformers model, not wrapped, and its tokenizer; arguments of :func:`load_model`.

    Returns:
        The model as transformers loads it, and its tokenizer.

    Raises:
        CouplingError: if transformers cannot load the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if untrained is None:
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CouplingError(
            f"got {name}, which transformers cannot load ({reason}); give a folder or a name "
            "on the hub, with a tokenizer"
        ) from None
    with seeded(untrained):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def layer_matrices(
    model: Any, ids: Sequence[int], layers: Sequence[int] | None, token: int, rank: int
) -> CouplingMatrices:
    """Compute the coupling matrices of every pair of layers at one token.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        ids: token ids of the prompt.
        layers: layers, counted from 1; by default four that are spread evenly.
        token: token of the Jacobians; negative counts from the end.
        rank: number K of singular vectors.

    Returns:
        One layer's Jacobian in the other layer's singular vectors, for every ordered pair.

    Raises:
        CouplingError: if there is no such layer, token or rank.
    """
    spread = np.linspace(1, model.n_layers, 4).round().astype(int)
    layers = list(layers or np.unique(spread).tolist())
    _check_layers(layers, model)
    blocks = [layer - 1 for layer in layers]
    jacobians = block_jacobians(
        model, torch.tensor([ids]), output_token=token, layers=blocks
    ).jacobians
    about = f"token {resolve_token(token, len(ids)) + 1} of {len(ids)}"
    return _all_pairs(jacobians, [f"layer {layer}" for layer in layers], rank, about)


def token_matrices(
    model: Any, ids: Sequence[int], layer: int | None, tokens: Sequence[int], rank: int, across: str
) -> CouplingMatrices:
    """Compute the coupling matrices of every pair of tokens at one layer.

    ``across`` says which of a Jacobian's two tokens differ, see ``ACROSS``. A fixed input token is
    the first of ``tokens``, a fixed output token the last.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        ids: token ids of the prompt.
        layer: layer, counted from 1; by default the middle one.
        tokens: positions in the prompt; negative counts from the end.
        rank: number K of singular vectors.
        across: ``self``, ``context_input`` or ``context_output``.

    Returns:
        One token's Jacobian in the other token's singular vectors, for every ordered pair.

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
    jacobians = [
        block_jacobians(
            model, torch.tensor([ids]), input_token=i, output_token=o, layers=[layer - 1]
        ).jacobians[0]
        for i, o in pairs
    ]
    names = [f"token {o + 1}" if across == "self" else f"token {i + 1} → {o + 1}" for i, o in pairs]
    return _all_pairs(torch.stack(jacobians), names, rank, f"{ACROSS[across]}, layer {layer}")


def _check_layers(layers: Sequence[int], model: Any) -> None:
    if unknown := [layer for layer in layers if not 1 <= layer <= model.n_layers]:
        raise CouplingError(f"got layer {unknown[0]}, expected 1 to {model.n_layers}")


def _all_pairs(
    jacobians: Float[Tensor, "jacobian d_model d_model"], names: list[str], rank: int, about: str
) -> CouplingMatrices:
    triplets = top_singular(jacobians, rank)
    A = coupling_matrices(jacobians, triplets.U, triplets.V).cpu().double().numpy()
    return CouplingMatrices(A, triplets.S[:, 0].cpu().double().numpy(), names, about)
