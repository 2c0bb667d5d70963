"""Memory: what is not needed any more goes at once, and a lack of it is seen as one, whatever the
device calls it.
"""

import gc
import weakref

import cases
import pytest
import torch

from lm_eval_coupling import ResidualModel, block_jacobians
from lm_eval_coupling.jacobians import levels
from lm_eval_coupling.jacobians.tangent import NearIdentity, Origin


def test_what_a_block_leaves_goes_with_it():
    """A norm's derivative led back to itself: a matrix per prompt and block stayed until Python
    looked for such circles.
    """
    gc.collect()
    gc.disable()
    try:
        root = Origin(2, 3)
        norm = NearIdentity.identity(root, torch.ones(2, 3)).scaled(
            torch.full((2, 3), 2.0), torch.Size([2, 3])
        )
        origin, seen = norm.as_origin, weakref.ref(norm)
        assert norm.as_origin is origin and torch.equal(origin.operator.diagonal, norm.diagonal)
        del norm
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("words", ["CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory"])
def test_lack_of_memory_is_no_reason_for_a_slower_level(words, monkeypatch):
    """Devices other than torch's own class say it in words: blocks then went one by one through the
    slowest level.
    """
    wrapped = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))

    def scarce(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(levels, "closed_jacobians", scarce)
    with pytest.raises(RuntimeError, match=words):
        block_jacobians(wrapped, cases.tiny_tokens(5))
