"""Independent pieces of work on the cores of a CPU, one thread each.

Products over all cores wait for each other at a barrier each time. On a busy machine a thread spins
there while the thread it waits for is not scheduled. Pieces on one core each have nothing to wait
for.
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
_SHARE = 2  # workers together take at most this fraction of the free memory: a half


def workers(bytes_each: int = 0) -> int:
    """Return how many workers may run side by side, each of them holding ``bytes_each``.

    It is the number of usable cores, or torch's own number of threads if the caller set a smaller
    one, within half of the free memory. Inside a worker it is 1.
    """
    if is_worker():
        return 1
    most = min(usable_cores(), torch.get_num_threads())
    if bytes_each and most > 1:
        most = min(most, limits.free_on_host() // (_SHARE * bytes_each))
    return max(1, most)


def run_each(work: Callable[[_In], _Out], items: Sequence[_In], count: int) -> list[_Out]:
    """Call ``work`` on every item by ``count`` workers, each with one thread for its products.

    With one worker the items are done in turn, by all threads of the caller. Gradients are off in
    workers. Settings of the caller are put back.

    Returns:
        Results in the order of the items.

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
            # A worker's setting is its own, but also what later threads of the process start with.
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
