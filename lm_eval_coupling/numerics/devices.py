"""What devices lack."""

from __future__ import annotations

import torch
from torch import Tensor


def off_mps(tensor: Tensor) -> Tensor:
    """``tensor`` on the host where it lies on MPS, which has neither float64 nor a symmetric eigendecomposition."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64."""
    return device.type != "mps"
