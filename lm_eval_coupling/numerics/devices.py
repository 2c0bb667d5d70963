"""Which devices there are, what they lack, and tensors and devices as they are handed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, shown


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
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    there = ", ".join(devices())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CouplingError(
            f"got device={name!r}, which torch does not know, expected one of: {there}"
        ) from None
    if device.type != "cpu" and str(device) not in devices():
        raise CouplingError(
            f"got device={name!r}, which this machine does not have, expected one of: {there}"
        )
    return device


def devices() -> list[str]:
    """Names of the devices of this machine that can be measured on."""
    gpus = (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return [
        "cpu",
        *(["cuda"] if gpus else []),
        *gpus,
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor, also of a NumPy array.

    Raises:
        CouplingError: for anything else.
    """
    try:
        if isinstance(value, Tensor | np.ndarray):
            return torch.as_tensor(value)
    except TypeError:  # of objects or texts
        pass
    raise CouplingError(f"got {name}={shown(value)}, expected a tensor")


def known_device(device: Any, there: bool = True) -> torch.device:
    """Return a device, also by its name.

    Raises:
        CouplingError: for a name that torch does not know, with ``there`` for a device that this machine does not have.
    """
    if not isinstance(device, str | torch.device):
        raise CouplingError(f"got device={shown(device)}, expected one of: {', '.join(devices())}")
    if there:
        return device_named(str(device))
    try:
        return torch.device(device)
    except RuntimeError:
        raise CouplingError(
            f"got device={shown(device)}, which torch does not know, expected one such as cpu"
        ) from None
