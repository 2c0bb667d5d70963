"""Jacobians of several prompts, stored block by block as they are computed, and their triplets.

Where they fit they stay on the device, and are decomposed there all at once. Larger ones are
decomposed on the device that computed them, and leave it once: first for one of a few pinned
buffers, then, while the next block is computed, for their final place.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.memory import jacobian_stack
from lm_eval_coupling.numerics.spectra import SingularTriplets, top_singular

# Size of a pinned buffer, and their number: torch never gives pinned memory back.
BUFFER_BYTES, BUFFERS = 256 << 20, 8
_FIELDS = ("U", "S", "V", "residual")


class Stack:
    """Storage for J of ``prompts`` times ``layers``; with a ``rank``, also their top triplets."""

    def __init__(
        self,
        prompts: int,
        layers: int,
        stream: Tensor,
        *,
        rank: int | None,
        scattered: bool = False,
    ) -> None:
        """Reserve the memory.

        Args:
            prompts: number of prompts.
            layers: number of blocks.
            stream: a tensor with the width, dtype and device of the residual stream.
            rank: number of singular triplets, or None for none.
            scattered: whether blocks lie on several devices, where they are decomposed then.
        """
        self.device = torch.device("cpu") if stream.device.type == "mps" else stream.device
        self.rank = rank
        room = jacobian_stack(prompts * layers, stream, on_host=scattered)
        self.jacobians: Float[Tensor, "prompt layer d_model d_model"] = room.view(
            prompts, layers, *room.shape[1:]
        )
        stays = room.device == stream.device and not scattered
        self._transfers = None if stays else _Transfers()
        self._triplets: dict[int, SingularTriplets | None] = {}

    def put(self, layer: int, jacobians: Float[Tensor, "prompt d_model d_model"]) -> None:
        """Store one layer's Jacobians."""
        if self._transfers is None:
            self.jacobians[:, layer] = jacobians
            return
        if self.rank is not None:
            self._triplets[layer] = self._decompose(jacobians)
        self._transfers.start(self.jacobians[:, layer], jacobians)

    def correct(self, prompt: int, layer: int, jacobian: Float[Tensor, "d_model d_model"]) -> None:
        """Replace one prompt's Jacobian in a stored layer."""
        if self._transfers is not None:
            self._transfers.finish()
        self.jacobians[prompt, layer] = jacobian.to(self.jacobians.device)
        if self._transfers is None or self.rank is None:
            return
        corrected, stored = self._decompose(jacobian), self._triplets[layer]
        if corrected is None or stored is None:
            self._triplets[layer] = None
            return
        for name in _FIELDS:
            getattr(stored, name)[prompt] = getattr(corrected, name)

    def finish(self) -> list[SingularTriplets] | None:
        """Wait for all transfers.

        Returns:
            The triplets of each prompt; None without a rank, or if a Jacobian is not finite.
        """
        if self._transfers is not None:
            self._transfers.finish()
        if self.rank is None:
            return None
        if self._transfers is None:
            triplets = self._decompose(self.jacobians)
            if triplets is None:
                return None
            parts = [getattr(triplets, name) for name in _FIELDS]
        else:
            layers = [self._triplets[layer] for layer in range(self.jacobians.shape[1])]
            if None in layers:
                return None
            parts = [
                torch.stack([getattr(layer, name) for layer in layers], dim=1) for name in _FIELDS
            ]
        return [SingularTriplets(*(part[i] for part in parts)) for i in range(len(self.jacobians))]

    def _decompose(self, jacobians: Tensor) -> SingularTriplets | None:
        assert self.rank is not None
        try:
            triplets = top_singular(jacobians, self.rank)
        except CouplingError:
            # One is not finite. The caller decomposes each prompt's alone, and learns whose it is.
            return None
        return SingularTriplets(*(getattr(triplets, name).to(self.device) for name in _FIELDS))


class _Transfers:
    """Copies from devices to pageable memory, through pinned buffers that a device can write to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        self.free: list[Tensor] = []

    def start(
        self,
        target: Float[Tensor, "prompt d_model d_model"],
        values: Float[Tensor, "prompt d_model d_model"],
    ) -> None:
        """Start to copy ``values`` to ``target``."""
        if values.device.type != "cuda":
            target.copy_(values)
            return
        itemsize = values[0].numel() * values.element_size()
        at_once = max(1, min(len(values), BUFFER_BYTES // itemsize))
        for part, piece in zip(target.split(at_once), values.split(at_once), strict=True):
            if len(self.waiting) == BUFFERS:
                self._finish_first()
            buffer = self.free.pop() if self.free else None
            if buffer is None:
                shape = (at_once, *values.shape[1:])
                buffer = torch.empty(shape, dtype=values.dtype, pin_memory=True)
            buffer[: len(piece)].copy_(piece, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self.waiting.append((part, buffer, event))

    def finish(self) -> None:
        """Wait for every transfer that has started."""
        while self.waiting:
            self._finish_first()

    def _finish_first(self) -> None:
        target, buffer, event = self.waiting.pop(0)
        event.synchronize()
        target.copy_(buffer[: len(target)])
        self.free.append(buffer)
