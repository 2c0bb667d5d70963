"""Forward passes take one thread once others are seen to take the cores, with the same bits."""

import time

import cases
import pytest
import torch
from torch_threads import torch_threads

from lm_eval_coupling.jacobians.certify import probe
from lm_eval_coupling.numerics.pass_threads import PassThreads
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.tracing import LONG


@pytest.fixture
def two_threads():
    with torch_threads(2):
        yield


def test_threads_follow_the_share_of_the_last_pass(two_threads):
    threads = PassThreads()
    with threads.limited():
        assert torch.get_num_threads() == 2
        time.sleep(0.1)  # as if others had the core
    assert threads.share < 0.5 and torch.get_num_threads() == 2
    with threads.watched():
        assert torch.get_num_threads() == 2
        time.sleep(0.1)
    with pytest.raises(ValueError), threads.limited():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2


def test_a_pass_on_one_thread_has_the_same_bits(two_threads):
    shape = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 128}
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32, **shape))
    prompts = [cases.tiny_tokens(seq)[0].tolist() for seq in (LONG, LONG + 9)]
    last = [len(ids) - 1 for ids in prompts]
    model.traces(prompts, torch.float32, last, probe)  # whether prompts may share a pass is tried
    seen, used = [], []
    forward = model.blocks[0].register_forward_hook(
        lambda *given: used.append(torch.get_num_threads())
    )
    for share in (1.0, 0.1):
        model.tracer.pass_threads.share = share
        traces = model.traces(prompts, torch.float32, last, probe)
        seen.append([trace.trajectory(-1) for trace in traces])
    forward.remove()
    assert used[0] == 2 and 1 in used
    assert all(map(torch.equal, *seen))
