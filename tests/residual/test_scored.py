"""What is scored is measured, with all that is on or around the model, or refused in a sentence."""

import copy
import gc
import warnings

import cases
import pytest
import torch
from oracles import oracle, worst
from random_weights import with_lora
from torch import nn
from torch.nn.utils import parametrizations, prune

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.untrained import untrained_twin

TOKENS = cases.tiny_tokens(9)
FUSED = {
    "gpt-neox": "query_key_value",
    "gpt2": "c_attn",
    "phi3": "qkv_proj",
    "falcon": "query_key_value",
    "mpt": "Wqkv",
}


def expected_jacobians(model):
    """Return those of the two blocks by float64 autograd."""
    reference = copy.deepcopy(model).double()
    return torch.stack([oracle(reference, TOKENS, layer, 8, 8) for layer in range(2)])


def measured_as_scored(scored, base, tolerance=2e-5):
    """Compare with float64 autograd through ``base``, the model inside ``scored``."""
    wrapped = ResidualModel.wrap(scored)
    found = block_jacobians(wrapped, TOKENS).jacobians.double()
    for jacobian, expected in zip(found, expected_jacobians(base), strict=True):
        assert worst(jacobian, expected) < tolerance
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED)
def test_lora_on_a_fused_projection_is_measured(case, dtype):
    """The bridge cuts the base model's projection out: in bf16 its attention was measured."""
    model = cases.tiny_model(case, dtype)
    plain = expected_jacobians(model)
    adapted = with_lora(model, [FUSED[case]])
    wrapped = measured_as_scored(adapted, adapted.get_base_model())
    assert wrapped.wrapping == "blocks"
    assert worst(block_jacobians(wrapped, TOKENS).jacobians, plain) > 1e-2


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str
)
def test_other_lora(options):
    adapted = with_lora(
        cases.tiny_model("llama", torch.float32), ["q_proj", "down_proj"], **options
    )
    measured_as_scored(adapted, adapted.get_base_model())


@pytest.mark.parametrize(
    "kind", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "LNTuningConfig"]
)
def test_other_adapters_of_weights(kind):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    options |= {
        "IA3Config": {"feedforward_modules": ["down_proj"]},
        "OFTConfig": {"oft_block_size": 0, "r": 4},
    }.get(kind, {})
    if kind == "VeraConfig":
        options = {"target_modules": ["q_proj", "o_proj"]}
    if kind == "LNTuningConfig":
        options = {}
    torch.manual_seed(0)
    model = cases.tiny_model("llama", torch.float32)
    adapted = peft.get_peft_model(
        model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    ).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    measured_as_scored(adapted, adapted.get_base_model())


def test_an_adapter_that_transformers_attaches():
    """It has a peft_config but no base model: wrapping failed with an AttributeError."""
    peft = pytest.importorskip("peft")
    model = cases.tiny_model("llama", torch.float32)
    plain = expected_jacobians(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)  # as its add_adapter does
    assert model.peft_config and not hasattr(model, "get_base_model")
    wrapped = measured_as_scored(model.eval(), model)
    assert worst(block_jacobians(wrapped, TOKENS).jacobians, plain) > 1e-3
    assert untrained_twin(model, 0).model.layers[0].self_attn.q_proj.weight.shape == (24, 24)


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_virtual_tokens_are_refused(kind):
    """The base model's coupling was reported as the adapted model's."""
    peft = pytest.importorskip("peft")
    model = cases.tiny_model("llama", torch.float32)
    adapted = peft.get_peft_model(
        model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    with pytest.raises(CouplingError, match="got an adapter of virtual tokens") as caught:
        ResidualModel.wrap(adapted)
    assert "\n" not in str(caught.value) and "coupling_limit=0" in str(caught.value)


@pytest.mark.parametrize("case", ["llama", "gpt-neox"])
def test_pruning_is_measured(case):
    """The pruned weight is an attribute made anew at every call: copying the model failed."""
    model = cases.tiny_model(case, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.random_unstructured(module, "weight", 0.5)
    model(TOKENS)  # leaves weights with a graph behind
    measured_as_scored(model, without_pruning(model))


def without_pruning(model):
    with torch.no_grad():
        model(TOKENS)  # weights without a graph can be copied
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    return model


@pytest.mark.parametrize("case", ["llama", "gpt-neox"])
def test_parametrisations_are_measured(case):
    model = cases.tiny_model(case, torch.float32)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    measured_as_scored(model, model)


def test_a_compiled_model_is_measured():
    """It was refused: TransformerLens cannot bridge an OptimizedModule."""
    model = cases.tiny_model("llama", torch.float32)
    measured_as_scored(torch.compile(model), model)
    model.compile()  # in place
    measured_as_scored(model, cases.tiny_model("llama", torch.float32))


def test_data_parallelism_is_looked_through():
    model = cases.tiny_model("llama", torch.float32)
    measured_as_scored(nn.DataParallel(model), model)


def test_a_subclass_is_measured():
    """Its name is not in TransformerLens' list; what it changes is seen."""
    model = cases.tiny_model("llama", torch.float32)
    same = type("MyLlama", (type(model),), {})
    model.__class__ = same
    assert measured_as_scored(model, model).wrapping == "bridge"

    class Scaled(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Scaled
    measured_as_scored(model, model)


@pytest.mark.parametrize("where", ["mlp", "self_attn", ""], ids=["mlp", "attention", "block"])
def test_hooks_that_steer_are_measured(where):
    model = cases.tiny_model("llama", torch.float32)
    plain = expected_jacobians(model)

    def twice(module, args, output):
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    model.model.layers[1].get_submodule(where).register_forward_hook(twice)
    wrapped = measured_as_scored(model, model)
    assert worst(block_jacobians(wrapped, TOKENS).jacobians[1], plain[1]) > 1e-2


def test_hooks_that_watch_share_what_they_write_to():
    """A hook that is a method of a large object must not bring a copy of it along."""

    class Recorder:
        def __init__(self):
            self.seen = 0

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def look(self, module, args, output):
            self.seen += 1

    recorder, model = Recorder(), cases.tiny_model("llama", torch.float32)
    model.model.layers[0].register_forward_hook(recorder.look)
    measured_as_scored_without_copy = ResidualModel.wrap(model)
    assert recorder.seen > 0 and measured_as_scored_without_copy.n_layers == 2


def test_mixed_precision_around_the_forward_method():
    """accelerate puts autocast around it, which replays of a block would not have."""
    accelerate = pytest.importorskip("accelerate")
    model = cases.tiny_model("llama", torch.float32)
    # One state per process, with the precision of the first Accelerator.
    accelerate.state.AcceleratorState._reset_state()
    try:
        prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(
            model, evaluation_mode=True
        )
        measured_as_scored(prepared, cases.tiny_model("llama", torch.float32))
    finally:
        accelerate.state.AcceleratorState._reset_state()


def test_another_forward_method_of_the_model_is_followed():
    """Put on the object by hand, around the old one: it was refused."""
    model = cases.tiny_model("llama", torch.float32)
    right = model.forward

    def louder(*args, **kwargs):
        output = right(*args, **kwargs)
        output.logits = output.logits + 1
        return output

    model.forward = louder
    wrapped = measured_as_scored(model, cases.tiny_model("llama", torch.float32))
    logits = wrapped.logits(wrapped.trace(TOKENS).resid_final[0])
    assert torch.allclose(logits, model(TOKENS).logits[0], atol=1e-4)


@pytest.mark.parametrize("case", cases.CASES)
def test_every_weight_follows_the_model(case):
    """TransformerLens cuts fused projections into copies: a change left the old attention."""
    model = cases.tiny_model(case, torch.float32)
    wrapped = ResidualModel.wrap(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    found = block_jacobians(wrapped, TOKENS, method="autodiff").jacobians
    for jacobian, expected in zip(found.double(), expected_jacobians(model), strict=True):
        assert worst(jacobian, expected) < 5e-6


@pytest.mark.parametrize(
    "case", ["gpt2", "gpt-neox", "phi3", "bloom", "mpt", "falcon", "llama", "mixtral", "qwen3-next"]
)
def test_nothing_stays_behind(case):
    """No graph, no attention pattern; Jacobians are plain numbers, which NumPy takes."""
    model = cases.tiny_model(case, torch.float32)
    wrapped = ResidualModel.wrap(model)
    measure_coupling(wrapped, [TOKENS[0].tolist()], ranks=(2,), progress=False)
    gc.collect()
    gc.freeze()  # what was there before is not listed
    block_jacobians(wrapped, TOKENS).jacobians.numpy()
    measure_coupling(wrapped, [TOKENS[0].tolist(), [3, 4]], ranks=(2,), progress=False)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    assert not [tuple(t.shape) for t in new]
    assert not any(t.requires_grad for t in wrapped.model.parameters())
