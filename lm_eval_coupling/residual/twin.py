"""The second module tree over the weights of a model: what is measured, and what may be changed for that."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from lm_eval_coupling.residual.weights import is_absent, sharing, state_of, without_hooks


def twin_of(model: nn.Module) -> nn.Module:
    """A second module tree over the same storage, in evaluation mode and without gradients; ``model`` stays untouched.

    Forward hooks, adapters, parametrisations and pruning of the model are part of it. Attention is as in the model.

    Returns:
        Modules of its own over the same parameters and buffers.
    """
    twin = without_hooks(copy.deepcopy(model, sharing(model)).eval())
    for module in twin.modules():
        if "_original_forward" in vars(
            module
        ):  # accelerate's mixed precision: autocast around the forward method
            vars(module).pop("forward", None)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def computes_eagerly(twin: nn.Module) -> None:
    """Attention, and experts, in steps that can be watched and differentiated in every mode."""
    twin.set_attn_implementation("eager")
    module: Any
    for module in twin.modules():
        if getattr(module, "fused_attn", None) is True:  # timm's
            module.fused_attn = False
    if hasattr(twin, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            twin.set_experts_implementation("eager")


def runs_as_it_stands(model: nn.Module) -> bool:
    """Whether the model runs as it stands: every weight present, and on one device."""
    weights = state_of(model)
    return not any(map(is_absent, weights)) and len({t.device for t in weights}) == 1


def block_lists(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Lists of modules that may be the blocks, the largest first: those that lie in no other list.

    Where the configuration says how many there are, and there is a list of so many, others are none. Which one it is, is for
    a pass to say.

    Yields:
        The modules of one list, in their order.
    """
    outer: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
            name.startswith(f"{other}.") for other in outer
        ):
            outer[name] = module
    found = [list(module) for module in outer.values()]
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [blocks for blocks in found if len(blocks) == expected] or found
    weights = {
        id(blocks): sum(p.numel() for block in blocks for p in block.parameters())
        for blocks in found
    }
    yield from sorted(
        (blocks for blocks in found if weights[id(blocks)]), key=lambda blocks: -weights[id(blocks)]
    )
