"""A wrapped model that was changed meanwhile is followed, or refused by name."""

import copy

import cases
import pytest
import torch
from torch import nn

from lm_eval_coupling import block_jacobians, measure_coupling
from lm_eval_coupling.errors import CouplingError, Unmeasurable
from lm_eval_coupling.residual import ResidualModel

PROMPT = cases.tiny_tokens(9)[0].tolist()


@pytest.fixture
def model():
    return cases.tiny_model("llama", torch.float32)


def value(wrapped):
    (record,) = measure_coupling(wrapped, [PROMPT], ranks=(2,), progress=False)
    assert record.reason is None
    return record.coupling(2)


def replace_weight(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(2 * layer.weight.data)


def swap_layers(model):
    model.model.layers = nn.ModuleList([*model.model.layers][::-1])


def steer(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def patch(model):
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * forward(x)


CHANGES = {
    "to half precision": (lambda model: model.half(), "weight model.embed_tokens.weight"),
    "to another device": (lambda model: model.to("meta"), "weight model.embed_tokens.weight"),
    "a weight": (replace_weight, "weight model.layers.0.mlp.up_proj.weight"),
    "the order of blocks": (swap_layers, "weight model.layers.0"),
    "one block less": (lambda model: model.model.layers.pop(1), "module model.layers.1"),
    "a hook": (steer, "module model.layers.0 "),
    "a function": (patch, "module model.layers.0.mlp "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_wrapped_model_does_not_follow_is_refused(model, name):
    """A second prompt of the same length had the numbers of the model before the change."""
    change, place = CHANGES[name]
    wrapped = ResidualModel.wrap(model)
    value(wrapped)
    change(model)
    with pytest.raises(CouplingError, match=f"whose {place}.*wrap the changed model anew"):
        value(wrapped)
    with pytest.raises(CouplingError, match="wrap the changed model anew"):
        block_jacobians(wrapped, torch.tensor([PROMPT]))


def test_an_adapter_that_is_switched_off_is_refused(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    wrapped = ResidualModel.wrap(adapted)
    value(wrapped)
    with adapted.disable_adapter(), pytest.raises(CouplingError, match="q_proj is not the one"):
        value(wrapped)
    value(wrapped)


def edit_norm(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def edit_rotation(model):
    model.model.rotary_emb.inv_freq.mul_(2)


@pytest.mark.parametrize("change", [edit_norm, edit_rotation])
def test_numbers_that_are_no_weights_are_compared_by_what_they_do(model, change):
    """A second prompt of the same length had the numbers of the model before the change."""
    wrapped = ResidualModel.wrap(model)
    value(wrapped)
    change(model)
    (record,) = measure_coupling(wrapped, [PROMPT], ranks=(2,), progress=False)
    assert record.reason is None or "when it scores this prompt" in record.reason
    if record.reason is None:
        fresh = value(ResidualModel.wrap(model))
        assert record.coupling(2) == pytest.approx(fresh, abs=1e-6)
    tokens = torch.tensor([PROMPT])
    try:
        jacobians = block_jacobians(wrapped, tokens).jacobians
    except Unmeasurable as error:
        assert "when it scores this prompt" in str(error)
    else:
        expected = block_jacobians(ResidualModel.wrap(model), tokens).jacobians
        assert torch.allclose(jacobians, expected, atol=1e-6)


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.tensor([PROMPT])
    model.train()(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval()


def load(model):
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("change", [train, load])
def test_numbers_that_are_written_into_the_weights_are_followed(model, change):
    wrapped = ResidualModel.wrap(model)
    before = value(wrapped)
    change(model)
    assert value(wrapped) == pytest.approx(value(ResidualModel.wrap(model)), abs=1e-6)
    assert value(wrapped) != pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.requires_grad_(False),
        lambda model: model.train(),
        lambda model: model.compile(backend="eager"),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: nn.DataParallel(model),
        copy.deepcopy,
    ],
)
def test_what_changes_no_number_is_no_change(model, change):
    wrapped = ResidualModel.wrap(model)
    before = value(wrapped)
    kept = change(model)
    assert value(wrapped) == before
    del kept


def test_a_model_on_no_device_is_described_as_changed(model):
    """Its rotary table was asked for numbers."""
    wrapped = ResidualModel.wrap(model)
    model.to("meta")
    assert wrapped.describe_change() == "the weight model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_an_interrupt_while_hooks_are_added_leaves_none(model, kind, monkeypatch):
    """All later prompts were refused: "a model that runs block 0 more than once"."""
    wrapped, register = ResidualModel.wrap(model), getattr(nn.Module, kind)
    before = value(wrapped)

    def interrupted(self, *args, **options):
        register(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, kind, interrupted)
    with pytest.raises(KeyboardInterrupt):
        value(wrapped)
    monkeypatch.undo()
    assert value(wrapped) == before
