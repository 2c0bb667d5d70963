"""Devices of this machine, and arguments that are devices or tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, shown


def off_mps(tensor: Tensor) -> Tensor:
    """Move a tensor from MPS, which has no float64 and no eigendecomposition, to the host."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def has_float64(device: torch.device) -> bool:
    """Return whether ``device`` computes in float64."""
    return device.type != "mps"


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_named(name: str | None, is_here: bool = True) -> torch.device:
    """Return the device of this name; by default the first GPU, else Apple's, else the CPU.

    Raises:
        CouplingError: for a name that torch does not know, and with ``is_here`` for a device that
            this machine does not have.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    names = ", ".join(devices())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CouplingError(
            f"got device={name!r}, which torch does not know, expected one of: {names}"
        ) from None
    if is_here and device.type != "cpu" and str(device) not in devices():
        raise CouplingError(
            f"got device={name!r}, which this machine does not have, expected one of: {names}"
        )
    return device


def devices() -> list[str]:
    """Return the names of the devices of this machine that can be measured on."""
    names = ["cpu"]
    if torch.cuda.is_available() and torch.cuda.device_count():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor or a NumPy array as a tensor, or raise CouplingError for anything else."""
    try:
        if isinstance(value, Tensor | np.ndarray):
            return torch.as_tensor(value)
    except TypeError:  # an array of objects or texts
        pass
    raise CouplingError(f"got {name}={shown(value)}, expected a tensor")


def known_device(device: Any, is_here: bool = True) -> torch.device:
    """Return a device that is given as one or by its name.

    Raises:
        CouplingError: for anything else, and as :func:`device_named` does.
    """
    if not isinstance(device, str | torch.device):
        raise CouplingError(f"got device={shown(device)}, expected one of: {', '.join(devices())}")
    return device_named(str(device), is_here)
