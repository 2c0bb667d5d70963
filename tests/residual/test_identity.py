"""When a model is still the one that was wrapped, and what measurements of it are kept under."""

import copy

import cases
import pytest
import torch

from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.fingerprint import digest, fingerprint


@pytest.fixture
def model():
    return cases.tiny_model("llama", torch.float32)


def test_evaluating_changes_nothing(model):
    """Scores, generation, training mode and back, measuring: all as it was."""
    wrapped = ResidualModel.wrap(model)
    with torch.no_grad():
        model(cases.tiny_tokens(5))
        model.generate(cases.tiny_tokens(5), max_new_tokens=3, pad_token_id=0)
    model.train().eval()
    wrapped.trace(cases.tiny_tokens(5))
    assert wrapped.describe_change() is None


def step(model):
    torch.optim.SGD(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def written_in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1


def written_through_data(model):
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)


def loaded(model):
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})


def loaded_into_new_storage(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def cast(model):
    model.to(torch.float64)


def steered(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)


def another_class(model):
    model.model.layers[0].mlp.__class__ = type("Other", (type(model.model.layers[0].mlp),), {})


@pytest.mark.parametrize(
    "change",
    [
        step,
        written_in_place,
        written_through_data,
        loaded,
        loaded_into_new_storage,
        cast,
        steered,
        another_class,
    ],
    ids=lambda f: f.__name__,
)
def test_a_change_is_seen(model, change):
    """The second run of a changed object reused the first one's numbers, by its old fingerprint."""
    wrapped = ResidualModel.wrap(model)
    change(model)
    assert wrapped.describe_change().startswith(
        ("the weight model.", "the module model.", "the weight lm_head")
    )
    assert ResidualModel.wrap(model).describe_change() is None


def test_a_few_numbers_written_through_data_are_seen(model):
    """One entry counts no write and may not be sampled: the numbers from before were reused."""
    wrapped = ResidualModel.wrap(model)
    before = wrapped.identity
    for weight in (layer.mlp.up_proj.weight for layer in model.model.layers):
        weight.data[1, 1] += 1
        weight.data[1, 2] -= 1
        assert wrapped.describe_change() == "a part of a weight"
        assert (wrapped := ResidualModel.wrap(model)).identity != before


def test_an_adapter_that_is_switched_off_is_seen(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    wrapped = ResidualModel.wrap(adapted)
    with adapted.disable_adapter():
        assert wrapped.describe_change() is not None
        assert ResidualModel.wrap(adapted).identity != wrapped.identity
    assert wrapped.describe_change() is None


def test_the_same_model_loaded_again_has_the_same_identity(model):
    found = ResidualModel.wrap(model).identity
    assert found == ResidualModel.wrap(copy.deepcopy(model)).identity
    assert found.startswith(fingerprint(model))


@pytest.mark.parametrize("way", ["bridge", "blocks"])
def test_both_ways_have_one_identity(model, way, monkeypatch):
    """Both measure the same: where a version of TransformerLens fails, results are reused."""
    from lm_eval_coupling.residual import wrapping as ways

    expected = ResidualModel.wrap(model).identity
    if way == "blocks":
        monkeypatch.setattr(ways, "put_bridge_into", lambda twin: 1 / 0)
    wrapped = ResidualModel.wrap(model)
    assert (wrapped.wrapping, wrapped.identity) == (way, expected)


def test_a_library_that_computes_something_else_gives_another_identity(model, monkeypatch):
    """transformers 5.13 computed OLMo 3 otherwise than 5.12: what 5.12 had measured was reused."""
    expected = ResidualModel.wrap(model).identity
    right = type(model.model.norm).forward

    def forward(self, x):
        return 1.02 * right(self, x)

    forward.__code__ = forward.__code__.replace(co_filename=right.__code__.co_filename)
    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    other = ResidualModel.wrap(model).identity
    assert other != expected and other.split("-")[0] == expected.split("-")[0]


def test_rounding_keeps_the_identity():
    """Another order of additions, as on another machine."""
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert len({digest(x * (1 + 1e-6 * torch.randn_like(x))) for _ in range(20)}) == 1
    assert digest(x) != digest(x * (1 + 2e-2 * torch.randn_like(x)))


def test_settings_changed_before_the_first_evaluation_are_seen():
    """The weights had not been read by then, and nothing else held the configuration."""
    model = cases.tiny_model("mistral", torch.float32)
    wrapped = ResidualModel.wrap(model)
    model.config.sliding_window = 3
    assert wrapped.describe_change() == "the configuration"


def test_another_implementation_of_attention_is_looked_at_anew(model):
    wrapped = ResidualModel.wrap(model)
    model.set_attn_implementation("sdpa")
    assert wrapped.describe_change() == "the configuration"
    assert ResidualModel.wrap(model).fingerprint == wrapped.fingerprint
