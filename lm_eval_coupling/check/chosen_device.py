"""The device that was asked for, or one sentence that says what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.memory import memory_of


def device_named(name: str | None) -> torch.device:
    """The device of this name; by default the first GPU, else Apple's, else the CPU.

    Returns:
        A device that this machine has.

    Raises:
        CouplingError: if there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ", ".join(devices())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CouplingError(f"got device={name!r}, which torch does not know, expected one of: {there}") from None
    if device.type != "cpu" and str(device) not in devices():
        raise CouplingError(f"got device={name!r}, which this machine does not have, expected one of: {there}")
    return device


def devices() -> list[str]:
    """Names of the devices of this machine that can be measured on."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda"] if gpus else []), *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def require_room(model: Any, *, rank: int, seq: int) -> None:
    """Refuse a device that cannot hold what one prompt takes beside the model.

    Raises:
        CouplingError: saying how much is missing.
    """
    needed, free = memory_of(model, rank=rank, seq=seq), limits.free(model.device)
    at_least = needed.bases + needed.working
    if at_least > free:
        raise CouplingError(
            f"got {model.device} with {free / 1e9:.1f} GB free beside the model, expected {at_least / 1e9:.1f} GB for the "
            f"Jacobian of one block of width {model.d_model}; use a larger device, or device=cpu"
        )
