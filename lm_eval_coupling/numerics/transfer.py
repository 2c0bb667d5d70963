"""How results leave a device: many in one transfer, since the device waits for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_host(value: Any) -> Any:
    """A tensor as a NumPy array; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return np.asarray(value.detach().cpu())


def all_on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any shapes on the CPU; those of one device and dtype are moved together."""
    kinds = [(value.device, value.dtype) for value in values]
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, one in enumerate(kinds) if one == kind]
        packed = torch.cat([values[i].detach().flatten() for i in places]).cpu()
        parts = packed.split([values[i].numel() for i in places])
        found |= {i: part.view(values[i].shape) for i, part in zip(places, parts, strict=True)}
    return [found[i] for i in range(len(values))]


def rows_on_host(columns: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """One dictionary of arrays for each prompt, from columns whose first axis is the prompt."""
    arrays = [column.numpy() for column in all_on_host([*columns.values()])]
    return [
        {name: array[i, ...] for name, array in zip(columns, arrays, strict=True)}
        for i in range(len(arrays[0]))
    ]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, which for a single tensor would copy it."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))
