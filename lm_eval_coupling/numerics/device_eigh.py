"""Eigendecompositions of many small symmetric matrices on a GPU, by the faster of two ways.

torch's dispatch of ``torch.linalg.eigh`` decides by version, library and size whether a batch is
decomposed together or matrix by matrix. So both ways are timed on the first batch of a shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.numerics.rotations import eigh_by_rotations

_FAST = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # NVIDIA P100, V100, A100, H100 and H200, B200
_Key = tuple[str, torch.dtype, int, int]
_CHOICES: dict[_Key, str] = {}


def has_fast_float64(device: torch.device) -> bool:
    """Return whether the GPU runs float64 at half its float32 rate; others have 1/32 or 1/64."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST


def device_eigh(
    H: Float[Tensor, "batch n n"], settled_at: float
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Return eigenvalues and eigenvectors, largest first, by the way that is faster for this shape.

    The first batch of a shape is decomposed four times. Batches count as one shape up to a factor
    of two in their number of matrices.

    Args:
        H: symmetric, in float64 or float32.
        settled_at: ‖off-diagonal part‖ / ‖H‖ at which rotations may stop.

    Returns:
        In the dtype and on the device of H; NaN for a matrix that is not decomposed.
    """
    key = (str(H.device), H.dtype, H.shape[-1], math.frexp(len(H))[1])
    if key not in _CHOICES:
        seconds = {name: _seconds(way, H, settled_at) for name, way in _WAYS.items()}
        _CHOICES[key] = min(seconds, key=lambda name: seconds[name])
    return _WAYS[_CHOICES[key]](H, settled_at)


def choices() -> dict[str, str]:
    """Return the way chosen for each device, dtype and shape in this process, in words."""
    return {
        f"{device}, {dtype}, {n} columns, below {1 << power} matrices": way
        for (device, dtype, n, power), way in _CHOICES.items()
    }


def _by_library(
    H: Float[Tensor, "batch n n"], settled_at: float
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    del settled_at
    finite = torch.isfinite(H).all(dim=(1, 2), keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, H, 0))
    values, vectors = values.flip(-1), vectors.flip(-1)
    return torch.where(finite[:, 0], values, torch.nan), torch.where(finite, vectors, torch.nan)


def _seconds(way: Callable[..., object], H: Tensor, settled_at: float) -> float:
    """Return the time of a second call, after one that starts the library; infinite if it fails."""
    try:
        way(H, settled_at)
        _wait(H.device)
        start = time.perf_counter()
        way(H, settled_at)
        _wait(H.device)
    except torch.linalg.LinAlgError:
        return math.inf
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_WAYS = {"rotations": eigh_by_rotations, "library": _by_library}
