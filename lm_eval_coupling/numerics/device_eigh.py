"""Eigendecompositions of many small symmetric matrices on a GPU, by the faster of two solvers.

torch's own ``torch.linalg.eigh`` decomposes a batch together or matrix by matrix, depending on its
version, the library behind it and the size. So both solvers are timed on the first batch of a
shape, and the faster one is used for that shape until the process ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.numerics.devices import wait_for
from lm_eval_coupling.numerics.rotations import eigh_by_rotations

_FAST = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # NVIDIA P100, V100, A100, H100 and H200, B200


# A function with the arguments and results of `device_eigh`.
_Solver: TypeAlias = Callable[[Tensor, float], tuple[Tensor, Tensor]]


class _Shape(NamedTuple):
    """Kind of batch for which one solver is chosen."""

    device: str
    dtype: torch.dtype
    columns: int
    below: int  # the smallest power of two above the number of matrices


_CHOICES: dict[_Shape, str] = {}


def has_fast_float64(device: torch.device) -> bool:
    """Return whether the GPU runs float64 at half its float32 rate; others have 1/32 or 1/64."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST


def device_eigh(
    H: Float[Tensor, "batch n n"], settled_at: float
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Return eigenvalues and eigenvectors, largest first, by the faster solver for this shape.

    The first batch of a shape is decomposed five times. Batches are of one shape if their numbers
    of matrices lie between the same powers of two.

    Args:
        H: symmetric, in float64 or float32.
        settled_at: ‖off-diagonal part‖ / ‖H‖ at which rotations may stop.

    Returns:
        In the dtype and on the device of H; NaN for a matrix that is not decomposed.
    """
    shape = _Shape(str(H.device), H.dtype, H.shape[-1], 1 << len(H).bit_length())
    if shape not in _CHOICES:
        seconds = {name: _seconds(solver, H, settled_at) for name, solver in SOLVERS.items()}
        _CHOICES[shape] = min(seconds, key=lambda name: seconds[name])
    return SOLVERS[_CHOICES[shape]](H, settled_at)


def choices() -> dict[str, str]:
    """Return the solver chosen for each device, dtype and shape in this process, in words."""
    return {
        f"{device}, {dtype}, {columns} columns, below {below} matrices": solver
        for (device, dtype, columns, below), solver in _CHOICES.items()
    }


def _eigh_by_library(
    H: Float[Tensor, "batch n n"], settled_at: float
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Decompose by torch, to full accuracy whatever ``settled_at`` is."""
    del settled_at
    # torch raises for the whole batch if one matrix holds NaN.
    finite = torch.isfinite(H).all(dim=(1, 2), keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, H, 0))
    values, vectors = values.flip(-1), vectors.flip(-1)
    return torch.where(finite[:, 0], values, torch.nan), torch.where(finite, vectors, torch.nan)


def _seconds(solver: _Solver, H: Tensor, settled_at: float) -> float:
    """Return the time of a second call; infinite if the solver fails."""
    try:
        solver(H, settled_at)  # loads the library
        wait_for(H.device)
        start = time.perf_counter()
        solver(H, settled_at)
        wait_for(H.device)
    except torch.linalg.LinAlgError:
        return math.inf
    return time.perf_counter() - start


SOLVERS: dict[str, _Solver] = {"rotations": eigh_by_rotations, "library": _eigh_by_library}
