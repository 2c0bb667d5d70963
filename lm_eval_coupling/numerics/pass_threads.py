"""Threads of a forward pass: all of them on a quiet machine, one on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BUSY = 0.75  # Share of its time that a pass has a core; below it others take the cores.


class PassThreads:
    """Choice of the number of threads for each forward pass, by how busy the last one found us.

    The threads of a product wait for each other at its end, and spin while one of them is not
    scheduled. One thread has nothing to wait for: beside two busy processes per core it takes half
    the time of two threads.

    Attributes:
        share: CPU time of the calling thread in the last forward pass over the time that the pass
            took; 1 on an idle machine, whatever the number of threads.
    """

    def __init__(self) -> None:
        self.share = 1.0

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Run a forward pass, with one thread of torch if the last one found the machine busy."""
        threads = torch.get_num_threads()
        if self.share < _BUSY:
            torch.set_num_threads(1)
        try:
            with self.watched():
                yield
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run a forward pass with the present number of threads, and take its share."""
        start, cpu = time.perf_counter(), time.thread_time()
        yield
        self.share = (time.thread_time() - cpu) / max(time.perf_counter() - start, 1e-9)
