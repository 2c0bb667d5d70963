"""The fingerprint covers every weight bit and the architecture, not where a model lies."""

import time

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lm_eval_coupling.residual import ResidualModel, object_digest
from lm_eval_coupling.residual.fingerprint import fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_the_same_weights_have_the_same_fingerprint(folder, tmp_path, device):
    """Saved, loaded, with another attention implementation, on another device, wrapped or not."""
    model = load(folder)
    found = fingerprint(model)
    model.save_pretrained(tmp_path / "elsewhere")
    assert len(found) == 32 and int(found, 16)
    assert fingerprint(load(tmp_path / "elsewhere")) == found
    assert fingerprint(load(folder, attn_implementation="eager")) == found
    assert fingerprint(load(folder).to(device)) == found
    ResidualModel.wrap(model)
    assert fingerprint(model) == found


def test_one_weight_changes_it_in_every_parameter(folder):
    model = load(folder)
    found = {fingerprint(model)}
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1:]
        kept = last.clone()
        last.copy_(torch.nextafter(last, last + 1))  # the smallest step there is
        found.add(fingerprint(model))
        last.copy_(kept)
    assert len(found) == 1 + len(list(model.parameters()))


def test_two_weights_that_change_places_change_it(folder):
    model = load(folder)
    before = fingerprint(model)
    weight = model.lm_head.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint(model) != before


def test_weights_far_apart_that_change_places_change_it(folder, monkeypatch):
    """Long tensors are read piece by piece: pieces must not be exchangeable."""
    monkeypatch.setattr(object_digest, "CHUNK", 64)
    model = load(folder)
    before = fingerprint(model)
    weight = model.lm_head.weight.data
    weight[[0, 8]] = weight[[8, 0]]  # 32 wide: row 8 begins a later piece, at the same place in it
    assert fingerprint(model) != before


def test_equal_tensors_that_change_names_change_it(folder):
    model = load(folder)
    before = fingerprint(model)
    layer = model.model.layers[0].self_attn
    layer.k_proj, layer.v_proj = layer.v_proj, layer.k_proj
    assert fingerprint(model) != before


def test_another_dtype_is_another_model(folder):
    assert (
        len(
            {
                fingerprint(load(folder, dtype=dtype))
                for dtype in ("float32", "bfloat16", "float16", "float64")
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}],
)
def test_the_architecture_counts(folder, change):
    model = load(folder)
    before = fingerprint(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert fingerprint(model) != before


def test_an_adapter_counts(folder):
    peft = pytest.importorskip("peft")
    model = load(folder)
    before = fingerprint(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    found = fingerprint(adapted)
    adapted.peft_config["default"].lora_alpha *= 2  # same weights, other strength
    assert len({before, found, fingerprint(adapted)}) == 3


@pytest.mark.parametrize(
    "shapes",
    [[(4000, 5000)], [(8, 8)] * 300],
    ids=["one large parameter", "many small ones cost no more than their size"],
)
def test_it_costs_about_one_read_of_the_weights(shapes):
    """20 million weights, or hundreds of norms and biases, take less than a second of CPU time."""
    model = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
    model.config = PretrainedConfig()
    start = time.process_time()
    fingerprint(model)
    assert time.process_time() - start < 1.0
