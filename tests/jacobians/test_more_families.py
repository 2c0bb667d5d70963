"""Block Jacobians of further families, each in one configuration, against float64 autograd of the
unmodified model.
"""

import copy

import cases
import every_family
import pytest
import torch
from oracles import decoder_layers, oracle, oracle_by_input, worst

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.residual import ResidualModel, TrueDtype


def tiny(case, dtype):
    model_type, changes = cases.MORE[case]
    return every_family.tiny(model_type, dtype, **changes)


@pytest.mark.parametrize("case", [case for case in cases.MORE if case != "xglm"])
def test_float64_jacobians_are_the_oracles(case, device):
    """At 1, 2 and 17 tokens, of the last token by itself and by the first."""
    if device.type == "mps":
        pytest.skip("MPS has no float64")
    model = tiny(case, torch.float64).to(device)
    wrapped = ResidualModel.wrap(model)
    for seq in (1, 2, 17):
        tokens = cases.tiny_tokens(seq).to(device)
        with TrueDtype(torch.float64):
            expected = [
                oracle_by_input(model, tokens, layer, seq - 1)
                for layer in range(len(decoder_layers(model)))
            ]
        for t_in in {0, seq - 1}:
            found = block_jacobians(wrapped, tokens, input_token=t_in, dtype=torch.float64)
            assert found.certificate.max() < 1e-10
            for layer, jacobian in enumerate(found.jacobians):
                assert worst(jacobian, expected[layer][:, t_in]) < 1e-12, (
                    seq,
                    t_in,
                    layer,
                    found.method,
                )


def test_a_family_that_transformers_cannot_run_in_float64():
    """XGLM fills a float32 scalar with the least float64: what there is to compare with is its own
    float32.
    """
    model, tokens = every_family.tiny("xglm", torch.float32), cases.tiny_tokens(9)
    found = block_jacobians(ResidualModel.wrap(model), tokens)
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian, oracle(model, tokens, layer, 8, 8)) < 1e-4


def test_what_blocks_hand_to_each_other_is_said():
    """Gemma 4's later blocks attend to the keys and values of earlier ones, which their derivatives
    hold fixed.
    """
    assert (
        "shared_kv_states of earlier blocks are held fixed"
        in ResidualModel.wrap(tiny("gemma4_text", torch.float32)).wrapping_reason
    )
    assert "held fixed" not in ResidualModel.wrap(tiny("lfm2", torch.float32)).wrapping_reason


@pytest.mark.parametrize("case", ["falcon-two-norms", "biogpt", "gemma4_text", "mamba2", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(case, dtype, device):
    """On every device, against float64 on the host."""
    model, tokens = tiny(case, dtype), cases.tiny_tokens(9)
    found = block_jacobians(ResidualModel.wrap(copy.deepcopy(model).to(device)), tokens)
    reference = copy.deepcopy(model).double()
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian.cpu().double(), oracle(reference, tokens, layer, 8, 8)) < 1e-4


@pytest.mark.parametrize("case", ["olmo", "olmo2", "olmo3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_olmo_in_half_precision(case, dtype, device):
    """The dtype it is published in: TransformerLens multiplies float32 queries with bf16 values,
    and wrapping failed.
    """
    model, tokens = cases.tiny_model(case, dtype), cases.tiny_tokens(9)
    found = block_jacobians(ResidualModel.wrap(copy.deepcopy(model).to(device)), tokens)
    reference = copy.deepcopy(model).double()
    for layer, jacobian in enumerate(found.jacobians):
        assert worst(jacobian.cpu().double(), oracle(reference, tokens, layer, 8, 8)) < 1e-4


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma3n_text", r"hands on a tensor of shape \[4, 1, 7, 32\]"),
        ("bert", "does not add to its input"),
        ("hrm_text", "expected"),
        ("reformer", "expected"),
    ],
)
def test_what_is_no_residual_stream_is_refused_in_one_sentence(model_type, message):
    """Several streams, a norm on the skip connection, blocks that run in circles, a stream split in
    two.
    """
    try:
        model = every_family.tiny(model_type)
    except Exception as error:
        pytest.skip(f"this transformers has no such model: {error}")
    with pytest.raises(CouplingError, match=message) as caught:
        ResidualModel.wrap(model)
    assert "\n" not in str(caught.value)
