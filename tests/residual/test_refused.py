"""What is no causal language model, or has no readable weights, is refused in one sentence."""

import threading

import cases
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5
from wrapping import tiny

from lm_eval_coupling import measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual import ResidualModel


def bert():
    return BertModel(
        BertConfig(
            vocab_size=61,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
    )


def t5():
    return T5(T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=24, num_layers=2, num_heads=4))


def headless():
    return LlamaModel(LlamaConfig(**cases._COMMON | cases._LLAMA_LIKE))


def packed():
    model = tiny()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )
    return model


def on_no_device():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**cases._COMMON | cases._LLAMA_LIKE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "got a BertModel"),
        (t5, "got a T5ForConditionalGeneration, expected a decoder-only"),
        (headless, "got a LlamaModel without a language-model head"),
        (packed, "layers.0.mlp.up_proj.weight packed as torch.int8"),
        (on_no_device, "embed_tokens.weight on no device"),
        (
            lambda: torch.nn.Linear(2, 2),
            "got a Linear, expected a decoder-only transformers language model",
        ),
    ],
    ids=["encoder", "encoder-decoder", "no head", "packed", "meta", "no transformer"],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(make, message):
    with pytest.raises(CouplingError, match=message) as caught:
        ResidualModel.wrap(make())
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_layers_of_several_dtypes_are_named(dtypes):
    """They were told to be no residual stream."""
    model = cases.tiny_model("llama", dtypes[0])
    model.model.layers[1].to(dtypes[1])
    with pytest.raises(
        CouplingError, match=r"in float32 .*bfloat16|in bfloat16 .*float32"
    ) as error:
        ResidualModel.wrap(model)
    assert "model.layers.1." in str(error.value) or "the first" in str(error.value)
    assert "expected one dtype" in str(error.value)


def test_a_model_that_overflows_is_told():
    """Its logits were "off by nan"."""
    model = cases.tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e38)
    with pytest.raises(CouplingError, match="not finite or nothing but zeros when it is scored"):
        ResidualModel.wrap(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_in_several_threads(dtype):
    """Their hooks met in one block: prompts had no coupling, for reasons that were none."""
    model, found = ResidualModel.wrap(cases.tiny_model("llama", dtype)), {}

    def work(number):
        found[number] = measure_coupling(model, [[1, 2, 3, 4]], ranks=2, progress=False)[
            0
        ].coupling(2)

    work(0)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 and set(found.values()) == {found[0]} and found[0] == found[0]
