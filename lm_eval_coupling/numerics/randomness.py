"""Random numbers that depend on a seed alone, and leave whatever else draws as if nothing had been drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from ``seed``, on the host; afterwards the generators of every device are as they were.

    `torch.manual_seed` is no help: it seeds all accelerators too, those not yet started at their start, and
    `torch.random.fork_rng` puts back only the ones it is told of. A run would then sample other texts than one without us.
    """
    host, devices = torch.get_rng_state(), _device_states()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):  # whatever default device the caller has set
            yield
    finally:
        torch.set_rng_state(host)
        for put_back in devices:
            put_back()


@contextmanager
def undrawn() -> Iterator[None]:
    """Inside, new `nn.Linear` layers are left as memory is: for those whose weights are set right away, in no time."""
    drawn = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = drawn  # type: ignore[method-assign]


def _device_states() -> list[Callable[[], None]]:
    """What puts back every accelerator that has started; one that has not has drawn nothing, and asking would start it."""
    found: list[Callable[[], None]] = []
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            found += [
                partial(module.set_rng_state, module.get_rng_state(index), index)
                for index in range(module.device_count())
            ]
    if torch.backends.mps.is_available():
        found.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return found
