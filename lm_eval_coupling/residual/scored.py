"""The transformers model inside what is scored, and the models that are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.image_inputs import takes_images
from lm_eval_coupling.residual.rotary import edited_tables
from lm_eval_coupling.residual.weights import unreadable

_ONLY_SCORE = "use --model hf, or coupling_limit=0, to only score"
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine", "DTensor")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off, and restore every module's mode."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class without_dropout(TorchFunctionMode):  # noqa: N801, a context manager
    """Call dropout as in evaluation mode, whatever mode its module is in."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the input of a dropout, and the result of anything else without its dropout."""
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:  # attention
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def without_compilation(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile: the same function, not compiled for a few tokens."""
    inner: Any = model
    while type(inner).__name__ == "OptimizedModule":
        inner = inner._orig_mod
    return inner


def looked_through(model: nn.Module) -> nn.Module:
    """Return the transformers model inside torch.compile, data parallelism and PEFT.

    Raises:
        CouplingError: for an adapter that acts outside the model, and for weights spread over
            processes.
    """
    inner: Any = model
    while True:
        name = type(inner).__name__
        if name in _SHARDED:
            raise CouplingError(
                f"got a {name}, whose weights are spread over processes, expected unsharded ones; "
                f"{_ONLY_SCORE}"
            )
        if name == "OptimizedModule":
            inner = inner._orig_mod
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            _refuse_adapters_outside(inner)
            inner = inner.get_base_model()
        else:
            return inner


def _refuse_adapters_outside(model: nn.Module) -> None:
    """Refuse adapters that act on prompts: virtual tokens, and activation from a token on."""
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
                f"got an adapter of virtual tokens ({kind}), expected one that changes weights, "
                f"such as LoRA; measure the model without it, or {_ONLY_SCORE}"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise CouplingError(
                "got an activated LoRA, which acts from its invocation tokens on, expected an "
                "adapter that acts on every token; measure the model without it, or "
                f"{_ONLY_SCORE}"
            )


def mixed_dtypes(model: nn.Module) -> str | None:
    """Describe which weights are in which dtype; None if all are in one dtype."""
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            names.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(name)
    if len(names) < 2:
        return None
    usual, *others = sorted(names, key=lambda dtype: -len(names[dtype]))
    rest = [f"{len(names[dtype])} in {dtype} ({names[dtype][0]} the first)" for dtype in others]
    return f"{len(names[usual])} weights in {usual} and {' and '.join(rest)}"


def refuse_unsupported(model: nn.Module) -> None:
    """Raise CouplingError for models of other kinds, and for weights that cannot be read."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not takes_images(model):
        _refuse_other_text_models(model, config, name)
    if any(True for module in model.modules() for _ in edited_tables(module)):
        raise CouplingError(
            f"got a {name} whose dynamic rotary table was edited, expected the one that passes "
            "make; edit original_inv_freq as well"
        )
    if any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise CouplingError(
            f"got a {name} whose weights are spread over processes, expected unsharded ones; "
            f"{_ONLY_SCORE}"
        )
    if reason := unreadable(model):
        raise CouplingError(
            f"got a {name} with {reason}, expected floating-point weights, or weights packed by "
            f"bitsandbytes, torchao or quanto, or offloaded by accelerate; {_ONLY_SCORE}"
        )


def _refuse_other_text_models(model: nn.Module, config: Any, name: str) -> None:
    if (
        config is None
        or getattr(config, "is_encoder_decoder", False)
        or not hasattr(model, "get_output_embeddings")
    ):
        raise CouplingError(
            f"got a {name}, expected a decoder-only transformers language model; score it with "
            "--model hf"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        raise CouplingError(
            f"got a {name}, an encoder, expected a decoder-only language model; score it with "
            "--model hf"
        )
    if model.get_output_embeddings() is None:
        raise CouplingError(
            f"got a {name} without a language-model head, expected a causal language model "
            "(…ForCausalLM)"
        )
