"""Checksums of a model's weights, architecture and attachments: the keys of measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.residual.attachments import Attachments, attachments_of
from lm_eval_coupling.residual.object_digest import checksum
from lm_eval_coupling.residual.weights import named_weights, persistent_buffers

_PROJECTIONS = 8
# Facts about where a model came from or how it is run, not about the function that it computes.
_IRRELEVANT = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("use_cache", "_attn_implementation"),
}


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Digits of everything that determines a model's function, and what could not be read of it."""

    digits: str
    unreadable: tuple[str, ...] = ()

    def own(self) -> str:
        """Return the digits; where something cannot be read, digits that no other model has."""
        if not self.unreadable:
            return self.digits
        return hashlib.sha256(f"{self.digits} {uuid.uuid4()}".encode()).hexdigest()[:32]


def fingerprint(model: nn.Module) -> str:
    """Digest every parameter and buffer bit by bit, the configuration, hooks and other attachments.

    Packed weights count as what they stand for. The sums are taken in wrapping 64-bit integers
    where the weights lie: the result is the same on every device, and costs one read of them.

    Returns:
        32 hex digits. A model that holds something unreadable has others every time.
    """
    return read_fingerprint(model, attachments_of(model)).own()


def read_fingerprint(model: nn.Module, attachments: Attachments) -> Fingerprint:
    """Compute the fingerprint of a model with attachments that were read before."""
    digest = hashlib.sha256(configuration(model).encode())
    for name, weight in named_weights(model):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {checksum(weight)}".encode())
    for name, buffer in persistent_buffers(model):
        text = f"buffer {name} {buffer.dtype} {tuple(buffer.shape)} {checksum(buffer)}"
        digest.update(text.encode())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            digest.update(f"buffer {name} in {buffer.dtype}".encode())  # a rounded rotary table
    for place, digits in sorted(attachments.items()):
        digest.update(f"{place} {digits}".encode())
    return Fingerprint(digest.hexdigest()[:32], tuple(attachments.unreadable))


def digest(output: Float[Tensor, "1 seq d_model"]) -> str:
    """Digest what a model gives for a fixed prompt: the stream after its last block.

    A library or an option that computes something else gives another digest. Projections are
    rounded to 1/500 of their size: another order of additions changes one model in a hundred,
    which is then measured anew.

    Returns:
        12 hex digits.
    """
    x = output.detach().flatten().cpu().double()  # in this order: some devices have no float64
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_PROJECTIONS, x.numel(), generator=generator, dtype=torch.float64)
    rounded = (directions @ x / (x.norm() + 1e-300) * 500).round().nan_to_num().to(torch.int64)
    return hashlib.sha256(repr(rounded.tolist()).encode()).hexdigest()[:12]


def configuration(model: nn.Module) -> str:
    """Return what the configurations of a model and its adapters say of its function, as JSON."""
    config = _relevant(model.config.to_dict())
    adapters = {
        name: _relevant(c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()
    }
    return json.dumps([config, adapters], sort_keys=True, default=str)


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _relevant(v) for k, v in value.items() if k not in _IRRELEVANT}
    return sorted(map(str, value)) if isinstance(value, set) else value
