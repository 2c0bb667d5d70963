"""TransformerLens' bridge put into the measuring module tree. The only module that knows TransformerLens."""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.residual.weights import split_again


def put_bridge_into(twin: nn.Module) -> nn.Module:
    """Replace the insides of the twin's blocks by TransformerLens' components over the same weights.

    Returns:
        TransformerLens' bridge, which runs the twin's blocks.

    Raises:
        Exception: whatever TransformerLens raises for a model that it cannot bridge.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = _architecture(twin)
    twin.config.architectures = [architecture]
    with seeded(0):  # its layers draw weights before they are given the model's
        bridge = build_bridge_from_module(twin, architecture, hf_config=twin.config, tokenizer=None)
    _split_joints_again(bridge)
    _take_caches_as_named_now(bridge)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return bridge


def _architecture(model: nn.Module) -> str:
    """Name of the transformers class that the model is, or is derived from."""
    classes = [c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")]
    return (classes[0] if classes else type(model)).__name__


def _split_joints_again(bridge: Any) -> None:
    """TransformerLens cuts joint projections into copies, once: here they are cut whenever they are used, and never kept."""
    joints = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    for module in bridge.modules():
        for split, names in joints.items():
            if (cut := getattr(module, split, None)) is not None:
                split_again(
                    module.original_component,
                    cut,
                    [getattr(module, name).original_component for name in names],
                )


def _take_caches_as_named_now(bridge: nn.Module) -> None:
    """Since transformers 5.24 attention layers are handed a ``cache``; TransformerLens 4.3 looks for ``past_key_values``.

    Not where it has transformers' own layer do the attention.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    for module in bridge.modules():
        if (
            isinstance(module, AttentionBridge)
            and type(module).forward is not AttentionBridge.forward
        ):
            module.register_forward_pre_hook(_with_cache_as_before, with_kwargs=True)


def _with_cache_as_before(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    if kwargs.get("cache") is None:
        return None
    return args, {
        ("past_key_values" if name == "cache" else name): value for name, value in kwargs.items()
    }
