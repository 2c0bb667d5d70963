"""Workers of one thread each: results in order, settings put back, errors passed on, memory
bounded.
"""

import threading
import time

import cases
import pytest
import torch
from torch_threads import torch_threads

from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics import workers as module
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.workers import run_each, usable_threads, workers
from lm_eval_coupling.residual import ResidualModel


@pytest.fixture
def threads():
    """Four threads for torch in this test."""
    with torch_threads(4):
        yield


def test_results_come_in_order_from_threads_of_one_thread_each(threads):
    barrier = threading.Barrier(3, timeout=60)

    def work(i):
        if i < 3:
            barrier.wait()  # three workers are there at the same time
        time.sleep(0.01 * (5 - i))
        return i, torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    results = run_each(work, range(5), 3)
    assert [i for i, *_ in results] == [0, 1, 2, 3, 4]
    assert {n for _, n, *_ in results} == {1} and not any(grad for _, _, grad, _ in results)
    assert threading.get_ident() not in {ident for *_, ident in results}


def test_settings_of_the_caller_are_put_back(threads):
    def fails(i):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_each(fails, range(4), 2)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == 4 and seen == [4]


def test_after_an_error_no_further_item_is_started(threads):
    started = []

    def work(i):
        started.append(i)
        if i == 0:
            raise RuntimeError("first")
        time.sleep(0.05)

    with pytest.raises(RuntimeError, match="first"):
        run_each(work, range(100), 2)
    assert len(started) < 50


def test_one_worker_is_the_caller_with_all_its_threads(threads):
    ident = threading.get_ident()
    assert run_each(lambda i: (torch.get_num_threads(), threading.get_ident()), [0], 8) == [
        (4, ident)
    ]
    assert run_each(lambda i: i, [], 8) == []


def test_exact_arithmetic_inside_waits_for_no_one(threads):
    """The caller holds the lock of the process's precision, and waits for its workers."""

    @exact_arithmetic()
    def work(i):
        return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")

    with exact_arithmetic(), torch.autocast("cpu"):
        results = run_each(work, range(4), 2)
    assert results == [("highest", False)] * 4


def test_no_worker_has_workers_of_its_own(threads, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    assert workers() == 4
    assert run_each(lambda i: workers(), range(2), 2) == [1, 1]


def test_there_are_no_more_than_cores_threads_and_memory_allow(threads, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 64)
    monkeypatch.setattr(limits, "free_on_host", lambda: 6000)
    assert workers() == 4  # the caller's own setting
    assert workers(1000) == 3  # half of the free memory
    assert workers(10**9) == 1
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    assert workers() == 2


def test_memory_that_others_will_take_is_left_to_them(threads, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 64)
    monkeypatch.setattr(limits, "free_on_host", lambda: 10_000)
    assert [workers(1000, reserved) for reserved in (0, 6000, 20_000)] == [4, 2, 1]


@pytest.mark.parametrize(("cores", "inside"), [(2, 2), (1, 1), (8, 4)])
def test_torch_has_no_more_threads_than_cores_while_measuring(threads, monkeypatch, cores, inside):
    """A container with a quota of one core ran torch with a thread for each core of the machine."""
    monkeypatch.setattr(module, "usable_cores", lambda: cores)

    @usable_threads()
    def count():
        return torch.get_num_threads()

    assert count() == inside and torch.get_num_threads() == 4


def test_a_prompt_is_measured_on_the_usable_cores(threads, monkeypatch):
    """A quota below one core: a single worker, which is one thread."""
    seen = set()
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    right = type(model).traces

    def traces(*arguments):
        seen.add((torch.get_num_threads(), workers()))
        return right(*arguments)

    monkeypatch.setattr(type(model), "traces", traces)
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    (record,) = measure_coupling(model, [[1, 2, 3]], ranks=(2,), progress=False)
    assert record.reason is None and seen == {(1, 1)} and torch.get_num_threads() == 4
