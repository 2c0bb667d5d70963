"""Independent pieces of work on the cores of a CPU, one thread each.

The threads of a product wait for each other at its end. On a busy machine they spin there while one
of them is not scheduled. Workers of one thread each have nothing to wait for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import threadpoolctl
import torch

from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.cores import usable_cores
from lm_eval_coupling.numerics.precision import become_worker, is_worker, true_float32

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def workers(bytes_each: int = 0, reserved: int = 0) -> int:
    """Return how many workers may run side by side.

    It is the number of usable cores, or torch's own number of threads if the caller set a smaller
    one. Together they take at most half of the memory that is free. Inside a worker it is 1.

    Args:
        bytes_each: memory that each worker takes.
        reserved: bytes of the free memory that will be taken by something else.
    """
    if is_worker():
        return 1
    most = min(usable_cores(), torch.get_num_threads())
    if bytes_each and most > 1:
        most = min(most, (limits.free_on_host() - reserved) // (2 * bytes_each))
    return max(1, most)


@contextmanager
def usable_threads() -> Iterator[None]:
    """Limit torch to the usable cores inside.

    torch starts a thread for every core of the machine, also where a quota gives it fewer. More
    threads than cores wait for each other at every product.
    """
    threads, cores = torch.get_num_threads(), usable_cores()
    if is_worker() or threads <= cores:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_each(work: Callable[[_In], _Out], items: Sequence[_In], count: int) -> list[_Out]:
    """Return ``work`` of every item, by ``count`` workers, each with one thread for its products.

    With one worker the items are done in turn, by all threads of the caller. Gradients are off in
    workers. Settings of the caller are put back.

    Raises:
        Exception: the first that ``work`` raises, once the items that have started are done.
    """
    count = min(count, len(items))
    if count <= 1:
        return [work(item) for item in items]
    with (
        true_float32(),
        one_blas_thread(),
        ThreadPoolExecutor(count, initializer=_start_worker) as pool,
    ):
        threads = torch.get_num_threads()
        try:
            futures = [pool.submit(_without_gradients, work, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
                pool.shutdown()
        finally:
            # A worker's setting holds for itself, and for threads that the process starts later.
            torch.set_num_threads(threads)


def _start_worker() -> None:
    become_worker()
    torch.set_num_threads(1)


def _without_gradients(work: Callable[[_In], _Out], item: _In) -> _Out:
    # Modes of torch belong to a thread: a new one has gradients on.
    with torch.no_grad():
        return work(item)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit the BLAS of NumPy and scipy to one thread; a worker is limited already."""
    # The limit is the whole process's: two workers that set and put it back would leave it at one.
    if is_worker():
        yield
        return
    with _thread_pools().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
