"""Random numbers that depend on a seed alone and do not disturb other random draws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, on the host; afterwards restore the generators of every device.

    `torch.manual_seed` seeds all accelerators too, some of them only when they start, and
    `torch.random.fork_rng` restores only the ones it is given. A run with coupling would then
    sample other texts than a run without.
    """
    host, devices = torch.get_rng_state(), _device_states()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):  # the caller may have set another default device
            yield
    finally:
        torch.set_rng_state(host)
        for put_back in devices:
            put_back()


@contextmanager
def undrawn() -> Iterator[None]:
    """Skip the initialization of `nn.Linear` inside: the weights are set right after.

    Other threads initialize theirs.
    """
    drawn, own = nn.Linear.reset_parameters, threading.get_ident()

    def reset_parameters(self: nn.Linear) -> None:
        if threading.get_ident() != own:
            drawn(self)

    nn.Linear.reset_parameters = reset_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = drawn  # type: ignore[method-assign]


def _device_states() -> list[Callable[[], None]]:
    """Return functions that restore the generators of all accelerators that have started.

    One that has not started has drawn nothing, and asking for its state would start it.
    """
    restores: list[Callable[[], None]] = []
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            restores += [
                partial(module.set_rng_state, module.get_rng_state(index), index)
                for index in range(module.device_count())
            ]
    if torch.backends.mps.is_available():
        restores.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return restores
