"""TransformerLens' bridge inside the measuring module tree; nothing else knows TransformerLens.

The names on which this relies are those of ``INTERNALS``. A test resolves each against the
installed release, and says which one moved.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.residual.weights import split_again

_OWN_BLOCKS = "the model's own blocks are measured, without a bridge"
# By module, the names that are called, read or replaced, and what happens without each.
INTERNALS = {
    "transformer_lens.model_bridge.sources": {"build_bridge_from_module": _OWN_BLOCKS},
    "transformer_lens.model_bridge.bridge": {"TransformerBridge": _OWN_BLOCKS},
    "transformer_lens.model_bridge.generalized_components": {
        "AttentionBridge.forward": _OWN_BLOCKS,
        "BlockBridge.original_component": _OWN_BLOCKS,
        # These two are attributes of an object, set from an argument of the same name.
        "JointQKVAttentionBridge(split_qkv_matrix)": _OWN_BLOCKS,
        "JointGateUpMLPBridge(split_gate_up_matrix)": _OWN_BLOCKS,
    },
}


def put_bridge_into(twin: nn.Module) -> nn.Module:
    """Return TransformerLens' bridge, whose components replace the insides of the twin's blocks.

    Raises:
        Exception: as TransformerLens raises for a model that it cannot bridge.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = _architecture(twin)
    twin.config.architectures = [architecture]
    with seeded(0):  # its layers draw weights before they are given the model's
        bridge = build_bridge_from_module(twin, architecture, hf_config=twin.config, tokenizer=None)
    _split_joints_again(bridge)
    _pass_cache_as_past_key_values(bridge)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return bridge


def is_component(module: nn.Module) -> bool:
    """Return whether a module is TransformerLens' own, with notes to itself between passes."""
    return type(module).__module__.startswith("transformer_lens.")


def innermost(module: nn.Module) -> nn.Module:
    """Return the transformers module inside TransformerLens' component."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def bridged_blocks(bridge: Any) -> list[nn.Module]:
    """Return the transformers blocks that a bridge runs."""
    return [block.original_component for block in bridge.blocks]


def _architecture(model: nn.Module) -> str:
    """Return the name of the transformers class that the model is, or is derived from."""
    classes = [c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")]
    return (classes[0] if classes else type(model)).__name__


def _split_joints_again(bridge: Any) -> None:
    """Cut joint projections for every use; TransformerLens cuts them into copies, once."""
    joints = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    for module in bridge.modules():
        for split, names in joints.items():
            if (cut := getattr(module, split, None)) is not None:
                pieces = [getattr(module, name).original_component for name in names]
                split_again(module.original_component, cut, pieces)


def _pass_cache_as_past_key_values(bridge: nn.Module) -> None:
    """Hand what transformers 5.24 calls ``cache`` to TransformerLens 4.3 as ``past_key_values``.

    Components that leave the attention to transformers' own layer take ``cache`` as it is.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    for module in bridge.modules():
        if isinstance(module, AttentionBridge):
            if type(module).forward is not AttentionBridge.forward:
                module.register_forward_pre_hook(_rename_cache, with_kwargs=True)


def _rename_cache(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    if kwargs.get("cache") is None:
        return None
    return args, {("past_key_values" if k == "cache" else k): v for k, v in kwargs.items()}
