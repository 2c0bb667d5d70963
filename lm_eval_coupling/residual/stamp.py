"""A cheap record of a model's state, by which a change between two evaluations is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual.attachments import (
    Attachments,
    attachments_of,
    own_hooks,
    replaced_forward,
)
from lm_eval_coupling.residual.fingerprint import configuration
from lm_eval_coupling.residual.rotary import recomputed_names
from lm_eval_coupling.residual.weights import named_tensors

SAMPLE = 64  # entries of each weight that are looked at


@dataclasses.dataclass(frozen=True)
class Stamp:
    """Places, write counts and some entries of a model's weights, its settings and attachments.

    Writing through ``p.data`` counts no write. It is seen where it changes a sampled entry, as an
    optimizer's step or another checkpoint does. The fingerprint sees the rest, by reading it all.
    """

    places: dict[str, tuple[Any, ...]]
    entries: dict[str, tuple[float, ...]]
    attached: Attachments
    classes: dict[str, tuple[type, bool, bool]]
    configuration: tuple[str, Any]
    ignored: frozenset[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        ignored: Collection[str] = (),
        attached: Attachments | None = None,
    ) -> Stamp:
        """Look at every module, and read a few numbers from each device.

        Args:
            model: any model.
            ignored: places that passes change.
            attached: what ``attachments_of`` has just returned for these arguments.

        Returns:
            The record of the model as it is now.
        """
        tensors = _tensors(model, ignored)
        return cls(
            places={name: _place(tensor) for name, tensor in tensors.items()},
            entries=dict(_entries(tensors)),
            attached=attachments_of(model, ignored) if attached is None else attached,
            classes={
                name: (type(module), "forward" in vars(module), module.training)
                for name, module in model.named_modules()
            },
            # The implementation of attention is no part of the configuration.
            configuration=(
                configuration(model),
                getattr(model.config, "_attn_implementation", None),
            ),
            ignored=frozenset(ignored),
        )

    def change_in(self, model: nn.Module) -> str | None:
        """Describe the first change of ``model`` since the stamp, or return None."""
        current = Stamp.of(model, self.ignored)
        if (name := _difference(self.places, current.places)) is not None:
            return f"the weight {name}"
        if (name := _difference(self.entries, current.entries)) is not None:
            return f"the weight {name}"
        if (name := _difference(self.classes, current.classes)) is not None:
            return f"the module {name or 'itself'}"
        if self.configuration != current.configuration:
            return "the configuration"
        if (name := _difference(self.attached, current.attached)) is not None:
            return f"the {name}"
        return None


class Glance(dict[str, Any]):
    """What a twin does not follow when its model changes, looked at in about a millisecond.

    A twin follows numbers that are written into its weights. It keeps the weights, modules, hooks,
    functions and adapters that it was made of.
    """

    @classmethod
    def at(cls, model: nn.Module, ignored: Collection[str], with_weights: bool = True) -> Glance:
        """Look at every module; at weights unless something moves them, such as offloading."""
        glance = cls()
        for name, module in model.named_modules():
            forward = replaced_forward(module) if "forward" in vars(module) else None
            hooks = [hook for _, hook in own_hooks(module)]
            glance[f"module {name or 'itself'}"] = (type(module), forward, hooks, _adapters(module))
        for name, tensor in _tensors(model, ignored).items() if with_weights else ():
            glance[f"weight {name}"] = (_memory(tensor), tensor.shape, tensor.dtype)
        return glance

    def change_to(self, current: Glance) -> str | None:
        """Name the first difference, or return None."""
        return _difference(self, current)


def _adapters(module: nn.Module) -> tuple[Any, ...]:
    """Return what PEFT's layers go by."""
    own = vars(module)
    if "_disable_adapters" not in own:
        return ()
    scaling = own.get("scaling")
    active = own.get("_active_adapter")
    return (
        own["_disable_adapters"],
        [*active] if isinstance(active, list) else active,
        dict(scaling) if isinstance(scaling, dict) else None,
        [*own.get("merged_adapters", ())],
    )


def _tensors(model: nn.Module, ignored: Collection[str]) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without those that passes change."""
    skipped = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in recomputed_names(module)
    } | {place.removeprefix("module ").replace(", buffer ", ".") for place in ignored}
    return {name: t for name, t in named_tensors(model) if name not in skipped}


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.device.type == "meta" else tensor.data_ptr()


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return the first name whose value differs or is missing."""
    names = [*after, *(name for name in before if name not in after)]
    return next((n for n in names if before.get(n, _MISSING) != after.get(n, _MISSING)), None)


_MISSING = object()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        writes = tensor._version
    except RuntimeError:  # made under torch.inference_mode: no count is kept
        writes = -1
    return _memory(tensor), writes, tensor.shape, tensor.dtype, tensor.device


@torch.no_grad()
def _entries(tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield some evenly spread entries of each weight, as float32.

    Entries are brought to the host together, a transfer per device, so that weights come in the
    order of their devices. Weights without numbers of their own are left out: those of the meta
    device, empty ones, and subclasses of tensors, such as quantized ones.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel() and type(tensor.data) is Tensor:
            flat = tensor.detach().flatten()
            # torch 2.6 cannot index floats of 8 bits.
            bits = flat.view(torch.uint8) if flat.element_size() == 1 else flat
            entries = bits[_spread(flat.numel()).to(tensor.device)].view(flat.dtype).float()
            by_device.setdefault(tensor.device, {})[name] = entries
    for samples in by_device.values():
        sizes = [len(entries) for entries in samples.values()]
        numbers = torch.cat([*samples.values()]).cpu().split(sizes)
        yield from ((name, tuple(n.tolist())) for name, n in zip(samples, numbers, strict=True))


def _spread(size: int) -> Tensor:
    """Return at most SAMPLE evenly spread places from 0 to size − 1, both included.

    Whole numbers are used: float32 ends at 2^24.
    """
    count = min(SAMPLE, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)
