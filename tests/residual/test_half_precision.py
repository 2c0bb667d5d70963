"""Another function is refused, rounding is not: half precision may leave nothing of a token."""

import copy
import math

import cases
import pytest
import torch
from oracles import oracle
from transformers import LlamaConfig, LlamaForCausalLM

from lm_eval_coupling import block_jacobians
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.inputs import TokenIds
from lm_eval_coupling.residual.load_checks import HALF, off_by, require_close_somewhere


def chaotic():
    """Make a model whose attention jumps from key to key after rounding, as SmolLM2's does."""
    model = cases.tiny_model("llama", torch.bfloat16, num_hidden_layers=16)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(10)
        layer.self_attn.k_proj.weight.data.mul_(10)
        layer.self_attn.o_proj.weight.data.mul_(3)
    return model


def test_tokens_of_which_rounding_leaves_nothing():
    """SmolLM2 in bf16, its own dtype, was refused: its logits are 68 % off those of float32."""
    model = chaotic()
    full = copy.deepcopy(model).float()
    ids = torch.tensor([TokenIds(model).probe])
    with torch.no_grad():
        assert off_by(model(ids).logits[0], full(ids).logits[0]) > HALF
    found = block_jacobians(ResidualModel.wrap(model), ids)
    assert found.certificate.max() < 1e-4
    expected = oracle(full, ids, 3, 6, 6)
    assert off_by(found.jacobians[3], expected) < 1e-4


class Adding(LlamaForCausalLM):
    """A model that adds its embeddings' logits: they are in the score, not in the stream."""

    def forward(self, input_ids, **kwargs):
        found = super().forward(input_ids, **kwargs)
        found.logits = found.logits + 30 * self.lm_head(self.model.embed_tokens(input_ids)).to(
            found.logits
        )
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_after_the_last_block_is_seen(dtype):
    torch.manual_seed(0)
    model = Adding(LlamaConfig(**cases._COMMON | cases._LLAMA_LIKE)).to(dtype).eval()
    with pytest.raises(CouplingError, match="logits after the last block off by"):
        ResidualModel.wrap(model)


def test_the_nearest_token_decides():
    expected = torch.eye(3)
    found = torch.stack([-expected[0], 1.1 * expected[1], expected[0]])
    require_close_somewhere("a stream", "Model", found, expected, HALF)
    with pytest.raises(CouplingError, match=r"a stream off by 1\.0e-01 from what Model"):
        require_close_somewhere("a stream", "Model", found, expected, 0.05)


def test_a_token_that_overflows_hides_no_difference_of_the_others():
    expected = torch.ones(3, 4)
    expected[0] = math.nan
    require_close_somewhere("a stream", "Model", expected, expected, HALF)
    with pytest.raises(CouplingError, match="a stream off by"):
        require_close_somewhere("a stream", "Model", 2 * expected, expected, HALF)
    with pytest.raises(CouplingError, match="a stream off by nan"):
        require_close_somewhere("a stream", "Model", math.nan * expected, expected, HALF)
