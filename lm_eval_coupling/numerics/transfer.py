"""Transfers of results to the host: many at once, since the device waits for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_host(value: Any) -> Any:
    """Return a tensor as a NumPy array, and any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    return np.asarray(value.detach().cpu())


def all_on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors of any shapes to the CPU, all of one device and dtype in one transfer."""
    kinds = [(value.device, value.dtype) for value in values]
    moved: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        packed = torch.cat([values[i].detach().flatten() for i in places]).cpu()
        parts = packed.split([values[i].numel() for i in places])
        moved |= {i: part.view(values[i].shape) for i, part in zip(places, parts, strict=True)}
    return [moved[i] for i in range(len(values))]


def rows_on_host(columns: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """Split columns, whose first axis is the prompt, into a dictionary of arrays per prompt."""
    arrays = [column.numpy() for column in all_on_host([*columns.values()])]
    return [
        {name: array[i, ...] for name, array in zip(columns, arrays, strict=True)}
        for i in range(len(arrays[0]))
    ]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return ``torch.stack`` of the tensors, without a copy if there is one only."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))
