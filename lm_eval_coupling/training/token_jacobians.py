"""Jacobians of one token that can be differentiated by the weights.

Every block is run again at the last token of a prompt, with the keys and values of the tokens
before it. All rows of its Jacobian come from one backward pass: the token is repeated d_model
times, and output i of copy i is differentiated. The graph is kept for a second backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from lm_eval_coupling.check.oracle import decoder_layers
from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory

# Largest difference of a block's output between the pass and the repeated token, relative.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
_UNSUPPORTED = "use a decoder such as Llama, Qwen, GPT-NeoX or GPT-2"


@dataclass
class _RecordingCache:
    """Stand-in for a cache in a whole pass: keeps keys and values with their graph."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple:
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class _PrefixCache:
    """Stand-in for a cache at one repeated token: puts keys and values of the prefix before it."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple:
        prefix = (
            part[:, :, :-1].expand(len(keys), -1, -1, -1) for part in (self.keys, self.values)
        )
        return tuple(
            torch.cat([before, own], dim=-2)
            for before, own in zip(prefix, (keys, values), strict=True)
        )


@dataclass
class _BlockCall:
    """One block's arguments, cache and output in a pass over one prompt."""

    block: nn.Module
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cache: _RecordingCache = field(default_factory=_RecordingCache)
    output: Tensor | None = None

    def record(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the cache by a recording one, and keep the arguments by name."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        named = dict(bound.arguments)
        extra = named.pop("kwargs", {})
        named |= extra
        caches = [name for name, value in named.items() if isinstance(value, Cache)]
        if len(caches) != 1:
            raise CouplingError(
                f"got a block {type(module).__name__} with {len(caches)} caches, expected one; "
                f"{_UNSUPPORTED}"
            )
        self.arguments = named
        self.arguments[caches[0]] = self.cache
        return (), named

    def keep_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def jacobian(self) -> Float[Tensor, "d_model d_model"]:
        """Return J at the last token.

        Raises:
            CouplingError: if the block cannot be run, or gives another output, at one token.
        """
        assert self.output is not None
        if self.cache.keys is None or self.cache.values is None:
            raise CouplingError(
                f"got a block {type(self.block).__name__} without keys and values; {_UNSUPPORTED}"
            )
        x = self.arguments["hidden_states"][0, -1]
        d_model = len(x)
        X = x.expand(d_model, 1, d_model).clone()
        if not X.requires_grad:
            X.requires_grad_()
        arguments = {name: _at_last(name, value) for name, value in self.arguments.items()} | {
            name: _PrefixCache(self.cache.keys, self.cache.values)
            for name, value in self.arguments.items()
            if value is self.cache
        }
        try:
            output = self.block(**arguments | {"hidden_states": X})
        except Exception as error:
            pass_on_lack_of_memory(error)
            raise CouplingError(
                f"got a block {type(self.block).__name__} that fails at one token with the keys of "
                f"the others ({type(error).__name__}); {_UNSUPPORTED}"
            ) from error
        Y = (output[0] if isinstance(output, tuple) else output)[:, 0]
        expected = self.output[0, -1]
        deviation = (Y[0] - expected).norm() / expected.norm().clamp_min(1e-12)
        if not deviation <= _TOLERANCE[expected.dtype]:
            raise CouplingError(
                f"got a block {type(self.block).__name__} that is off by {float(deviation):.1e} at "
                f"one token with the keys of the others; {_UNSUPPORTED}"
            )
        (rows,) = torch.autograd.grad(Y.diagonal().sum(), X, create_graph=True)
        return rows[:, 0] - torch.eye(d_model, dtype=rows.dtype, device=rows.device)


def _at_last(name: str, value: Any) -> Any:
    """Cut an argument of a block to the last token."""
    if isinstance(value, tuple | list):
        return type(value)(_at_last(name, part) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name == "position_embeddings" or (name == "attention_mask" and value.ndim == 4):
        return value[..., -1:, :]
    return value[..., -1:] if name in ("position_ids", "cache_position") else value


def token_jacobians(
    model: nn.Module, input_ids: Int[Tensor, " seq"]
) -> Float[Tensor, "layer d_model d_model"]:
    """Compute J_tt of every block at the last token of a prompt, differentiable by the weights.

    Costs about six passes of every block over d_model tokens, and as much again for the backward
    pass through the result. Memory grows with n_layers · d_model² and the width of the MLP.

    Args:
        model: a transformers decoder with keys and values, in evaluation mode.
        input_ids: token ids of one prompt without padding.

    Returns:
        Jacobians in the dtype of the model, with their graph.

    Raises:
        CouplingError: if a block has no cache, or is not reproduced at one token.
    """
    config: Any = model.config
    blocks = decoder_layers(model, config.get_text_config().num_hidden_layers)
    calls = [_BlockCall(block) for block in blocks]
    handles = [
        handle
        for call in calls
        for handle in (
            call.block.register_forward_pre_hook(call.record, with_kwargs=True),
            call.block.register_forward_hook(call.keep_output, with_kwargs=True),
        )
    ]
    # Only this kernel has a second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            model(input_ids=input_ids[None], use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([call.jacobian() for call in calls])
