"""Which devices there are, and what they lack."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_eval_coupling.errors import CouplingError


def off_mps(tensor: Tensor) -> Tensor:
    """``tensor`` on the host where it lies on MPS, which has neither float64 nor a symmetric eigendecomposition."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64."""
    return device.type != "mps"


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
