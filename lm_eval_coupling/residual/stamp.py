"""Are a model's weights still those that were wrapped and fingerprinted? Asked before every evaluation, so cheaply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual.weights import named_tensors

SAMPLE = 64  # entries of each weight that are looked at
_OF_RUNS = {
    "training",
    "_is_hf_initialized",
    "gradient_checkpointing",
}  # which evaluating or loading may set


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A model as it stands: where its weights lie, how often each was written to, some of its numbers, and its switches.

    Writing through autograd's back door (``p.data``) counts no write: it is seen where it changes one of the sampled
    entries, as an optimizer's step or another checkpoint does. The fingerprint sees the rest, at the cost of reading it all.
    """

    places: dict[str, tuple[Any, ...]]
    entries: dict[str, tuple[float, ...]]
    switches: dict[str, tuple[Any, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Stamp:
        """Costs a look at every module and one read of a few numbers from each device."""
        tensors = dict(named_tensors(model))
        return cls(
            {name: _place(tensor) for name, tensor in tensors.items()},
            dict(_entries(tensors)),
            {name: _switches(module) for name, module in model.named_modules()},
        )

    def change_in(self, model: nn.Module) -> str | None:
        """In words, the first thing in which ``model`` is no longer what it was; None if it is."""
        now = Stamp.of(model)
        for name in now.places.keys() | self.places.keys():
            if now.places.get(name) != self.places.get(name) or now.entries.get(
                name
            ) != self.entries.get(name):
                return f"the weight {name}"
        for name in now.switches.keys() | self.switches.keys():
            if now.switches.get(name) != self.switches.get(name):
                return f"the module {name or 'itself'}"
        return None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        writes = tensor._version
    except RuntimeError:  # made under torch.inference_mode: no count is kept
        writes = -1
    where = 0 if tensor.device.type == "meta" else tensor.data_ptr()
    return where, writes, tensor.shape, tensor.dtype, tensor.device


@torch.no_grad()
def _entries(tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Some entries of each weight, evenly spread; brought to the host together."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel() and type(tensor.data) is Tensor:
            flat = (
                tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
            )
            by_device.setdefault(tensor.device, {})[name] = flat[
                _spread(flat.numel()).to(tensor.device)
            ].float()
    for found in by_device.values():
        numbers = (
            torch.cat([*found.values()]).cpu().split([len(entries) for entries in found.values()])
        )
        yield from ((name, tuple(part.tolist())) for name, part in zip(found, numbers, strict=True))


def _spread(size: int) -> Tensor:
    """At most SAMPLE places from 0 to size − 1, both included, evenly spread; in whole numbers, as float32 ends at 2^24."""
    count = min(SAMPLE, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def _switches(module: nn.Module) -> tuple[Any, ...]:
    """What kind of module it is, its hooks, and its plain attributes: active adapters, scales, dropout."""
    hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
    plain = {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_RUNS and _is_plain(value)
    }
    return type(module), hooks, repr(sorted(plain.items()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
