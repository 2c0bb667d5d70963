"""Jacobians of several prompts as they are made, block by block, and their singular triplets.

Where they fit they stay on the device, and are decomposed there all at once. Larger ones are decomposed while they are on
the device that made them, and leave it once: into one of a few buffers that the device writes to by itself, and from there,
while the next block is at work, to where they will lie.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.memory import jacobian_stack
from lm_eval_coupling.numerics.spectra import SingularTriplets, top_singular

PIECE, WAITING = (
    256 << 20,
    8,
)  # bytes of a buffer, and how many: torch never gives memory back that devices write to


class Stack:
    """Room for J of ``prompts`` times ``layers``; with ``rank``, their top triplets are found as well."""

    def __init__(
        self, prompts: int, layers: int, like: Tensor, *, rank: int | None, scattered: bool = False
    ) -> None:
        """``scattered``: blocks lie on several devices, where they are decomposed."""
        self.device, self.rank = (
            torch.device("cpu") if like.device.type == "mps" else like.device,
            rank,
        )
        room = jacobian_stack(prompts * layers, like, on_host=scattered)
        self.jacobians: Float[Tensor, "prompt layer d_model d_model"] = room.view(
            prompts, layers, *room.shape[1:]
        )
        self.stays = room.device == like.device and not scattered
        self._leaving = None if self.stays else _Leaving()
        self._triplets: dict[int, SingularTriplets | None] = {}

    def put(self, layer: int, jacobians: Float[Tensor, "prompt d_model d_model"]) -> None:
        """Those of one block."""
        if self._leaving is None:
            self.jacobians[:, layer] = jacobians
            return
        if self.rank is not None:
            self._triplets[layer] = self._found(jacobians)
        self._leaving.put(self.jacobians[:, layer], jacobians)

    def correct(self, prompt: int, layer: int, jacobian: Float[Tensor, "d_model d_model"]) -> None:
        """One that was made again, of a block whose others are there."""
        if self._leaving is not None:
            self._leaving.finish()
        self.jacobians[prompt, layer] = jacobian.to(self.jacobians.device)
        if self._leaving is None or self.rank is None:
            return
        found = self._found(jacobian)
        whole = self._triplets[layer]
        if found is None or whole is None:
            self._triplets[layer] = None
            return
        for name in ("U", "S", "V", "residual"):
            getattr(whole, name)[prompt] = getattr(found, name)

    def finish(self) -> list[SingularTriplets] | None:
        """Wait until all lies where it will; the triplets of each prompt, if they were asked for and all can be had."""
        if self._leaving is not None:
            self._leaving.finish()
        if self.rank is None:
            return None
        if self._leaving is None:
            found = self._found(self.jacobians)
            if found is None:
                return None
            return [
                SingularTriplets(found.U[i], found.S[i], found.V[i], found.residual[i])
                for i in range(len(found.S))
            ]
        layers = [
            found
            for layer in range(self.jacobians.shape[1])
            if (found := self._triplets[layer]) is not None
        ]
        if len(layers) < self.jacobians.shape[1]:
            return None
        return [
            SingularTriplets(
                *(
                    torch.stack([getattr(one, name)[i] for one in layers])
                    for name in ("U", "S", "V", "residual")
                )
            )
            for i in range(len(self.jacobians))
        ]

    def _found(self, jacobians: Tensor) -> SingularTriplets | None:
        assert self.rank is not None  # who asked for no triplets does not come here
        try:
            found = top_singular(jacobians, self.rank)
        except (
            CouplingError
        ):  # one that is not finite: whoever asks for each prompt's alone learns whose it is
            return None
        return SingularTriplets(
            *(getattr(found, name).to(self.device) for name in ("U", "S", "V", "residual"))
        )


class _Leaving:
    """Copies from devices to pageable memory that a device cannot write to by itself, one behind the computation."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        self.free: list[Tensor] = []

    def put(
        self,
        place: Float[Tensor, "prompt d_model d_model"],
        values: Float[Tensor, "prompt d_model d_model"],
    ) -> None:
        """Begin to bring ``values`` to ``place``."""
        if values.device.type != "cuda":
            place.copy_(values)
            return
        at_once = max(1, min(len(values), PIECE // (values[0].numel() * values.element_size())))
        for part, piece in zip(place.split(at_once), values.split(at_once), strict=True):
            if len(self.waiting) == WAITING:
                self._arrive()
            size = (at_once, *values.shape[1:])
            buffer = (
                self.free.pop()
                if self.free
                else torch.empty(size, dtype=values.dtype, pin_memory=True)
            )
            buffer[: len(piece)].copy_(piece, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self.waiting.append((part, buffer, event))

    def finish(self) -> None:
        """Wait for all that has begun."""
        while self.waiting:
            self._arrive()

    def _arrive(self) -> None:
        place, buffer, event = self.waiting.pop(0)
        event.synchronize()
        place.copy_(buffer[: len(place)])
        self.free.append(buffer)
