"""A checksum of a model's weights and architecture: what makes a stored measurement valid for a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.residual.weights import named_weights

_CHUNK = 1 << 22
_PROJECTIONS = 8
# Facts about where a model came from or how it is run, not about the function it computes.
_IRRELEVANT = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "_attn_implementation",
}


def fingerprint(model: nn.Module) -> str:
    """32 hex digits over every parameter, bit by bit, and the configuration; packed weights count as what they stand for.

    The sums are taken in wrapping 64-bit integers where the weights lie, so the result is the same on every device and
    costs one read of the weights.

    Returns:
        The digits.
    """
    digest = hashlib.sha256(_configuration(model).encode())
    for name, weight in named_weights(model):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {_checksum(weight)}".encode())
    return digest.hexdigest()[:32]


def digest(output: Float[Tensor, "1 seq d_model"]) -> str:
    """12 hex digits of what a model gives for a fixed prompt: the stream after its last block.

    A version of transformers, TransformerLens or torch, or an option, that computes something else gives another digest. It
    is of projections rounded to 1/500 of their size, so that another order of additions keeps it, but for one model in a
    hundred, which is then measured anew.

    Returns:
        The digits.
    """
    x = output.detach().flatten().cpu().double()  # in this order: some devices have no float64
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_PROJECTIONS, x.numel(), generator=generator, dtype=torch.float64)
    rounded = (directions @ x / (x.norm() + 1e-300) * 500).round().nan_to_num().to(torch.int64)
    return hashlib.sha256(repr(rounded.tolist()).encode()).hexdigest()[:12]


def _configuration(model: nn.Module) -> str:
    config = _relevant(model.config.to_dict())
    adapters = {
        name: _relevant(c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()
    }
    return json.dumps([config, adapters], sort_keys=True, default=str)


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _relevant(v) for k, v in value.items() if k not in _IRRELEVANT}
    return sorted(map(str, value)) if isinstance(value, set) else value


def _checksum(tensor: Tensor) -> list[int]:
    """Plain and position-weighted sums of the tensor's bits."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
    bits = tensor.detach().contiguous().view(-1).view(integer)
    weights = torch.arange(1, min(_CHUNK, bits.numel()) + 1, device=bits.device)
    sums = [0, 0]
    for i, chunk in enumerate(bits.split(_CHUNK)):
        wide = chunk.to(torch.int64)
        sums[0] += (i + 1) * int(wide.sum())
        sums[1] += (i + 1) * int((wide * weights[: wide.numel()]).sum())
    return sums
