"""Workers of machines with many cores: counted in the announcement, and bounded by memory."""

import cases
import pytest
import torch

from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics import memory as memory_module
from lm_eval_coupling.numerics import workers as workers_module
from lm_eval_coupling.numerics.memory import block_workers, layers_at_once, memory, spectra_workers
from lm_eval_coupling.residual import ResidualModel

GB = 10**9
CPU = torch.device("cpu")
# Llama 3 8B: blocks of 218 million weights, of which 0.9 GB are copied to float32.
LARGE = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "block_params": 218_112_000}
SMALL = {"n_layers": 30, "d_model": 576, "n_heads": 9, "block_params": 3_540_096}


@pytest.fixture
def machine(monkeypatch):
    """Pretend a number of cores and an amount of free memory."""

    def set_machine(cores, free):
        monkeypatch.setattr(workers_module, "usable_cores", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        monkeypatch.setattr(limits, "free_on_host", lambda: free)

    return set_machine


@pytest.mark.parametrize("cores", [2, 16, 64])
def test_every_worker_of_a_small_model_is_counted(machine, cores):
    machine(1, 100 * GB)
    alone = memory(**SMALL, rank=50, seq=128, prompts=8)
    machine(cores, 100 * GB)
    together = memory(**SMALL, rank=50, seq=128, prompts=8)
    assert together.workers == min(cores, 30) and alone.workers == 1
    assert together.jacobians == alone.jacobians and together.bases == alone.bases
    per_block = 8 * (13 * 576 * 576 // 2) * 4
    assert together.working >= together.workers * per_block
    assert f"while at work on {together.workers} blocks side by side" in str(together)
    assert "side by side" not in str(alone)


@pytest.mark.parametrize("free", [4 * GB, 12 * GB, 32 * GB, 64 * GB, 500 * GB])
@pytest.mark.parametrize("cores", [16, 64])
def test_workers_stop_where_memory_does(machine, cores, free):
    machine(1, free)
    least = memory(**LARGE, rank=50, seq=128)
    machine(cores, free)
    planned = memory(**LARGE, rank=50, seq=128)
    assert 1 <= planned.workers <= min(cores, 32)
    if planned.working > least.working:  # more than one worker needs in any case
        assert planned.working + planned.jacobians <= 0.8 * free
    if free == 500 * GB:
        assert planned.workers == min(cores, 32)
    if free == 4 * GB:
        assert planned.workers == 1 and planned.where == "disk"


@pytest.mark.parametrize("free", [1 * GB, 10 * GB, 100 * GB])
@pytest.mark.parametrize("d_model", [576, 2048, 4096, 8192])
def test_decompositions_side_by_side_take_half_of_the_free_memory(machine, d_model, free):
    """Sixty-four matrices of 8192 columns took 100 GB, on a machine of any size."""
    machine(64, free)
    matrix = 6 * d_model**2 * 4
    count, at_once = spectra_workers(d_model, 4), layers_at_once(d_model, 4, CPU)
    assert count * at_once == 1 or count * at_once * matrix <= free // 2
    assert count == 64 or count * matrix <= free // 2 < (count + 1) * matrix or count == 1


def test_no_more_threads_are_started_than_planned(machine, monkeypatch):
    """Counted while prompts are measured on sixteen pretended cores, with and without memory."""
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    started, right = [], workers_module.ThreadPoolExecutor

    class Pool(right):
        def __init__(self, count, **options):
            started.append(count)
            super().__init__(count, **options)

    monkeypatch.setattr(workers_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    machine(16, 100 * GB)
    measure_coupling(model, [[1, 2, 3]] * 4, ranks=(2,), progress=False)
    assert 1 < max(started) <= 16
    started.clear()
    machine(16, 0)
    (record,) = measure_coupling(model, [[1, 2, 3]], ranks=(2,), progress=False)
    assert record.reason is None and not started


def test_as_many_blocks_run_side_by_side_as_are_announced(machine):
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    machine(64, 100 * GB)
    assert block_workers(model, 1) == model.n_layers
    assert memory_module.memory_of(model, rank=2, seq=5).workers == model.n_layers
    shape = memory_module.shape_of(model, 4)
    assert memory(**shape | {"independent": False}, rank=2, seq=5).workers == 1
    assert memory(**shape | {"scattered": True}, rank=2, seq=5).workers == 1
