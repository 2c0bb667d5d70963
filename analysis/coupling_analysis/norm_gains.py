"""Models whose norms have lost their gains: folded into the weights that follow, or made equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError

KINDS = ("as trained", "folded", "equal")

_OF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OF_MLP = ("mlp.gate_proj", "mlp.up_proj")


@torch.no_grad()
def change_gains(model: nn.Module, kind: str) -> None:
    """Change in place the gains of the norms that blocks of a Llama-like model begin halves with.

    Args:
        model: a causal language model of transformers, with weights in float32.
        kind: one of `KINDS`. ``folded`` moves a gain into the linear layers that read the norm,
            which leaves the function as it was; ``equal`` puts the root of its mean square in
            place of each coordinate, which makes another function.

    Raises:
        CouplingError: if there is no such norm.
    """
    norms = list(_norms(model))
    if not norms:
        raise CouplingError(
            f"got a {type(model).__name__}, expected blocks with input_layernorm before "
            f"{', '.join(_OF_ATTENTION)}"
        )
    for norm, readers in norms:
        gain, offset = _gain(norm)
        if kind == "folded":
            for reader in readers:
                reader.weight *= gain
            norm.weight.fill_(1 - offset)
        elif kind == "equal":
            norm.weight.fill_(gain.square().mean().sqrt() - offset)


def _norms(model: nn.Module) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the norms before attention and MLP with the linear layers that read them."""
    block: Any
    for block in model.modules():
        if not hasattr(block, "input_layernorm") or not hasattr(block, "self_attn"):
            continue
        yield block.input_layernorm, [block.get_submodule(name) for name in _OF_ATTENTION]
        # In blocks with four norms, the one after attention acts on what it returns.
        of_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        yield of_mlp, [block.get_submodule(name) for name in _OF_MLP]


def _gain(norm: Any) -> tuple[Tensor, int]:
    """Return what a norm multiplies by, and what that is beyond its weight: 0, or Gemma's 1."""
    weight: Tensor = norm.weight
    offset = round((norm(torch.ones_like(weight)) - weight).mean().item())
    return weight + offset, offset
