"""The transformers model in what is scored: wrappers are looked through, what could not be measured as scored is refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.image_inputs import takes_images
from lm_eval_coupling.residual.weights import unreadable

_ONLY_SCORE = "use --model hf, or coupling_limit=0, to only score"
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine", "DTensor")


def without_compilation(model: nn.Module) -> nn.Module:
    """What torch.compile has wrapped: the same function, without compiling it for a few tokens."""
    inner: Any = model
    while type(inner).__name__ == "OptimizedModule":
        inner = inner._orig_mod
    return inner


def looked_through(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, data parallelism and PEFT.

    Returns:
        The model itself where nothing is around it.

    Raises:
        CouplingError: for an adapter that is no part of it (virtual tokens), and for weights spread over processes.
    """
    inner: Any = model
    while True:
        name = type(inner).__name__
        if name in _SHARDED:
            raise CouplingError(
                f"got a {name}, whose weights are spread over processes, expected whole ones; {_ONLY_SCORE}"
            )
        if name == "OptimizedModule":
            inner = inner._orig_mod
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            _refuse_virtual_tokens(inner)
            inner = inner.get_base_model()
        else:
            return inner


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Prompt tuning, prefix tuning and p-tuning put tokens before the prompt that are in no block's weights."""
    configs = getattr(model, "peft_config", {})
    active = (
        getattr(model, "active_adapters", None)
        or getattr(model, "active_adapter", None)
        or [*configs]
    )
    for name in [active] if isinstance(active, str) else active:
        config = configs.get(name)
        if config is not None and getattr(config, "is_prompt_learning", False):
            kind = (
                str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
            )
            raise CouplingError(
                f"got an adapter of virtual tokens ({kind}), expected one that changes weights, such as LoRA; "
                f"measure the model without it, or {_ONLY_SCORE}"
            )


def mixed_dtypes(model: nn.Module) -> str | None:
    """Which weights are in which dtype, in words, None where all are in one."""
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            names.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(name)
    if len(names) < 2:
        return None
    usual, *others = sorted(names, key=lambda dtype: -len(names[dtype]))
    told = [f"{len(names[dtype])} in {dtype} ({names[dtype][0]} the first)" for dtype in others]
    return f"{len(names[usual])} weights in {usual} and {' and '.join(told)}"


def refuse_unsupported(model: nn.Module) -> None:
    """Say of what is no causal language model and no image classifier, or has weights that cannot be read, what it is.

    Raises:
        CouplingError: if it is one.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not takes_images(model):
        _refuse_other_text_models(model, config, name)
    if any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise CouplingError(
            f"got a {name} whose weights are spread over processes, expected whole ones; {_ONLY_SCORE}"
        )
    if reason := unreadable(model):
        raise CouplingError(
            f"got a {name} with {reason}, expected floating-point weights, such as bitsandbytes, torchao or quanto pack, or "
            f"such as accelerate offloads; {_ONLY_SCORE}"
        )


def _refuse_other_text_models(model: nn.Module, config: Any, name: str) -> None:
    if (
        config is None
        or getattr(config, "is_encoder_decoder", False)
        or not hasattr(model, "get_output_embeddings")
    ):
        raise CouplingError(
            f"got a {name}, expected a decoder-only transformers language model; score it with --model hf"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        raise CouplingError(
            f"got a {name}, an encoder, expected a decoder-only language model; score it with --model hf"
        )
    if model.get_output_embeddings() is None:
        raise CouplingError(
            f"got a {name} without a language-model head, expected a causal language model (…ForCausalLM)"
        )
