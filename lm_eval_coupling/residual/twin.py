"""The second module tree that TransformerLens may change, and what is asked of a model before it gets one."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.block_call import hidden
from lm_eval_coupling.residual.weights import is_absent, sharing, split_again, unreadable, without_hooks

PROBE = [1, 2]


def require_close(what: str, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The bridge splits joint projections into copies of its own: what counts is that it computes the same function."""
    if not torch.isfinite(expected).all():
        return  # weights that are not finite are reported prompt by prompt, the score is kept
    error = ((found - expected.to(found)).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise CouplingError(
            f"got {what} off by {error:.1e} from TransformerLens' bridge of {name}, expected the model's own; "
            "score it with --model hf, or with coupling_limit=0"
        )


@torch.no_grad()
def logits_of(model: nn.Module, device: torch.device | None = None) -> Tensor:
    """What the model says of two tokens, in float32."""
    device = device or model.get_input_embeddings().weight.device
    return model(torch.tensor([PROBE], device=device), use_cache=False).logits.float()


def output_of(model: nn.Module, module: nn.Module, device: torch.device) -> Tensor:
    """What ``module`` hands on in a pass of ``model``."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(hidden(output)))
    try:
        logits_of(model, device)
    finally:
        handle.remove()
    return seen[0]


def twin_of(model: nn.Module) -> nn.Module:
    """A second module tree over the same storage: bridging changes modules in place, scores must not move."""
    twin = without_hooks(copy.deepcopy(model, sharing(model)).eval())
    twin.config.architectures = [type(model).__name__]
    twin.set_attn_implementation("eager")
    if hasattr(twin, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            twin.set_experts_implementation("eager")
    return twin


def refuse_unsupported(model: nn.Module) -> None:
    """Say of a model that is no causal language model, or whose weights cannot be read, what it is.

    Raises:
        CouplingError: if it is one.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_output_embeddings"):
        raise CouplingError(f"got a {name}, expected a decoder-only transformers language model; score it with --model hf")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise CouplingError(f"got a {name}, an encoder, expected a decoder-only language model; score it with --model hf")
    if model.get_output_embeddings() is None:
        raise CouplingError(f"got a {name} without a language-model head, expected a causal language model (…ForCausalLM)")
    if reason := unreadable(model):
        raise CouplingError(
            f"got a {name} with {reason}, expected floating-point weights, such as bitsandbytes, torchao or quanto pack, or "
            "such as accelerate offloads; use --model hf, or coupling_limit=0, to only score"
        )


def state_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def runs_as_it_stands(model: nn.Module) -> bool:
    """Whether the model runs as it stands: every weight present, and on one device."""
    weights = state_of(model)
    return not any(map(is_absent, weights)) and len({t.device for t in weights}) == 1


def split_joints_again(bridge: nn.Module) -> None:
    """TransformerLens splits joint projections once; those of absent weights must be split whenever they are fetched."""
    joints = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    for module in bridge.modules():
        for split, names in joints.items():
            if (cut := getattr(module, split, None)) is not None:
                split_again(module.original_component, cut, [getattr(module, name).original_component for name in names])


def take_caches_as_named_now(bridge: nn.Module) -> None:
    """Since transformers 5.24 attention layers are handed a ``cache``; TransformerLens 4.3 looks for ``past_key_values``.

    Not where it has transformers' own layer do the attention.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    for module in bridge.modules():
        if isinstance(module, AttentionBridge) and type(module).forward is not AttentionBridge.forward:
            module.register_forward_pre_hook(_with_cache_as_before, with_kwargs=True)


def _with_cache_as_before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if kwargs.get("cache") is None:
        return None
    return args, {("past_key_values" if name == "cache" else name): value for name, value in kwargs.items()}
