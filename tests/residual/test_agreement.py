"""Measured prompts are what the scored model computes for them, alone, whatever it holds."""

import copy
import inspect
import math
import threading
from functools import partial

import cases
import pytest
import torch
from oracles import oracle, worst
from torch import nn
from transformers import LlamaModel

from lm_eval_coupling import block_jacobians, measure_coupling
from lm_eval_coupling.errors import CouplingError, Unmeasurable
from lm_eval_coupling.residual import ResidualModel

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = cases.tiny_tokens(9)
LONG = cases.tiny_tokens(21)[0].tolist()
SHORT = cases.tiny_tokens(6)[0].tolist()


@pytest.fixture
def model():
    return cases.tiny_model("llama", torch.float32)


def as_oracle(model, tokens=TOKENS):
    """Jacobians are those of autograd through the model itself, hooks included."""
    last = tokens.shape[1] - 1
    jacobians = block_jacobians(ResidualModel.wrap(model), tokens).jacobians
    for layer, jacobian in enumerate(jacobians):
        assert worst(jacobian, oracle(model, tokens, layer, last, last)) < 1e-4


def measured(model, prompts):
    return measure_coupling(ResidualModel.wrap(model), prompts, ranks=(2,), progress=False)


def steer(module, args, output, *, scale=0.3):
    output[:, -1] += scale


def later(module, args, output):
    output = output.clone()
    output[:, 8:] *= 1.5
    return output


def before(module, args):
    return (args[0] * 1.1, *args[1:])


@pytest.mark.parametrize("hook", [steer, later, partial(steer, scale=1.0)])
@pytest.mark.parametrize("where", ["mlp", "self_attn.o_proj", ""])
@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_are_measured_wherever_they_are(model, hook, where, layer):
    """Also in place, at the last layer, and at tokens that no probe has."""
    if hook is later and not where:
        hook = steer  # it would scale the skip connection of some tokens
    model.model.layers[layer].get_submodule(where).register_forward_hook(hook)
    as_oracle(model)


def test_hooks_at_later_tokens_are_measured_in_long_prompts(model):
    """A step of decoding has one token, at which such a hook does nothing."""
    model.model.layers[1].mlp.register_forward_hook(later)
    as_oracle(model, cases.tiny_tokens(70))


def test_hooks_before_a_block_are_part_of_it(model):
    """They ran twice in every replay: once in its input, once in the call."""
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.3, *args[1:]))
    model.model.layers[1].mlp.register_forward_pre_hook(before)
    as_oracle(model)


def test_a_hook_at_the_last_token_is_not_given_another_prompts_padding(model):
    model.model.layers[0].register_forward_hook(steer)
    alone = [measured(model, [prompt])[0] for prompt in (SHORT, LONG)]
    for a, b in zip(alone, measured(model, [SHORT, LONG]), strict=True):
        assert a.reason is None and a.coupling(2) == pytest.approx(b.coupling(2), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_method_replaced_by_a_closure_is_a_hook_that_does_the_same(dtype):
    """A copy called the original's method, whose weights stay in bf16."""
    hooked, patched = (cases.tiny_model("llama", dtype) for _ in range(2))
    hooked.model.layers[1].mlp.register_forward_hook(lambda m, args, output: output * 1.5)
    forward = patched.model.layers[1].mlp.forward
    patched.model.layers[1].mlp.forward = lambda x: forward(x) * 1.5
    a, b = (measured(model, [SHORT])[0] for model in (hooked, patched))
    assert a.reason is None and a.coupling(2) == pytest.approx(b.coupling(2), abs=1e-6)


class Patcher:
    def __init__(self, module):
        self.inner = module.forward
        module.forward = self.forward

    def forward(self, x):
        return self.inner(x) * 1.5


def test_a_method_of_another_object_is_followed(model):
    Patcher(model.model.layers[1].mlp)
    as_oracle(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hook_that_calls_another_part_of_the_model(dtype):
    """In the twin it calls the twin's part, whose weights are in the trace's dtype."""
    model = cases.tiny_model("llama", dtype)
    norm = model.model.layers[1].input_layernorm
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: norm(output))
    (record,) = measured(model, [SHORT])
    assert record.reason is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_acts_outside_the_blocks_on_some_prompts_is_refused(dtype):
    """A wrapper that changes the model by what it reads in the ids, as activated adapters do."""

    class Switching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module, self.config = inner, inner.config

        def forward(self, input_ids, **options):
            part = self.module.model.layers[1].mlp.down_proj
            handle = part.register_forward_hook(
                lambda module, args, output: output * (3 if (input_ids == 59).any() else 1)
            )
            try:
                return self.module(input_ids, **options)
            finally:
                handle.remove()

        def get_base_model(self):
            return self.module

    wrapped = ResidualModel.wrap(Switching(cases.tiny_model("llama", dtype)).eval())
    without, active = measure_coupling(wrapped, [[5, 3, 7], [5, 59, 7]], ranks=(2,), progress=False)
    assert without.reason is None
    assert active.singular_values is None and "when it scores this prompt" in active.reason
    with pytest.raises(Unmeasurable, match="when it scores this prompt"):
        block_jacobians(wrapped, [5, 59, 7])


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 3,
        "long_factor": [1.0, 3.0, 9.0],
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_rotary_table_is_that_of_the_prompt_alone(kind):
    """It was that of the longest prompt of the pass, or of the passes before."""

    def model():
        rope = dict(ROPES[kind])
        return cases.tiny_model(
            "llama", torch.float32, rope_parameters=rope, max_position_embeddings=8
        )

    middle = LONG[:12]
    alone = [measured(model(), [prompt])[0] for prompt in (SHORT, middle, LONG)]
    used = model()
    with torch.no_grad():
        used(torch.tensor([LONG]))  # leaves its table behind
    wrapped = ResidualModel.wrap(used)
    measure = partial(measure_coupling, ranks=(2,), progress=False)
    together = measure(wrapped, [SHORT, middle, LONG])
    after = [measure(wrapped, [prompt])[0] for prompt in (LONG, SHORT, middle, LONG)][1:]
    for a, b, c in zip(alone, together, after, strict=True):
        assert a.reason is b.reason is c.reason is None
        for other in (b, c):
            assert other.singular_values == pytest.approx(a.singular_values, rel=1e-5)


class Growing(nn.Module):
    """A rotary table in plain attributes, with its length, as in remote code."""

    def __init__(self, rotary):
        super().__init__()
        self.inv, self.seen, self.tables = rotary.inv_freq.clone(), 0, {}

    def forward(self, x, position_ids):
        n = position_ids.shape[-1]
        if n > self.seen:
            self.seen = 2 * n
            angles = torch.outer(torch.arange(2.0 * n), self.inv)
            angles = torch.cat([angles, angles], -1)
            self.tables["cos"], self.tables["sin"] = angles.cos(), angles.sin()
        return tuple(self.tables[k][None, :n].to(x.dtype) for k in ("cos", "sin"))


def test_a_table_that_grows_is_put_back_with_its_length(model):
    prompts = [LONG, SHORT, LONG]
    expected = measured(model, prompts)
    model.model.rotary_emb = Growing(model.model.rotary_emb)
    wrapped = ResidualModel.wrap(model)
    for a, b in zip(
        expected, measure_coupling(wrapped, prompts, ranks=(2,), progress=False), strict=True
    ):
        assert b.reason is None and b.coupling(2) == pytest.approx(a.coupling(2), abs=1e-5)
    assert wrapped.describe_change() is None


def test_a_hook_that_takes_arrays_changes_nothing(model):
    expected = measured(model, [SHORT])[0]
    kept = []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: kept.append(output.numpy())
    )
    (record,) = measured(model, [SHORT])
    assert record.reason is None and kept
    assert record.coupling(2) == pytest.approx(expected.coupling(2), abs=1e-5)


def test_what_cannot_be_copied_is_shared(model):
    model.lock, model.model.layers[0].log = threading.Lock(), [threading.Lock()]
    model.model.layers[0].register_full_backward_hook(lambda *call: None)
    model.model.norm.last = [torch.ones(3, requires_grad=True) * 2]  # has a history
    as_oracle(model)


def test_a_compiled_method_is_the_method(model):
    expected = measured(model, [SHORT])[0].coupling(2)
    model.forward = torch.compile(model.forward, backend="eager")
    compiled = model.forward
    (record,) = measured(model, [SHORT])
    assert record.coupling(2) == pytest.approx(expected, abs=1e-6)
    assert model.forward is compiled


def test_weights_in_layers_of_torch_are_refused_by_name(model):
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CouplingError, match="packed by torch.ao"):
        ResidualModel.wrap(packed)


def test_a_registered_attention_function_is_measured(model):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def windowed(module, query, key, value, attention_mask, **options):
        n = key.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        keep = ((j <= i) & ((j > i - 8) | (j < 2)))[-query.shape[2] :]
        return sdpa_attention_forward(module, query, key, value, keep[None, None], **options)

    AttentionInterface.register("windowed", windowed)
    AttentionMaskInterface.register("windowed", sdpa_mask)
    model.set_attn_implementation("windowed")
    as_oracle(model, cases.tiny_tokens(17))


def test_an_adapter_that_acts_from_a_token_on_is_refused(model):
    peft = pytest.importorskip("peft")
    if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip("this peft has no activated LoRA")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    )
    with pytest.raises(CouplingError, match="got an activated LoRA"):
        ResidualModel.wrap(peft.get_peft_model(model, config))


class Packed(torch.Tensor):
    """Integers that unpack themselves, as the weights of torchao and quanto do."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor).float() / 64


class PackedLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None
        integers = (weight * 64).round().clamp(-127, 127).to(torch.int8).as_subclass(Packed)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.dequantize().to(x.dtype))


def packed(model, dense=False):
    for layer in model.model.layers:
        linear = PackedLinear(layer.mlp.down_proj.weight.data)
        if dense:
            layer.mlp.down_proj.weight.data = linear.weight.dequantize()
        else:
            layer.mlp.down_proj = linear
    return model


def test_a_hook_on_a_packed_layer_is_measured():
    values = []
    for dense in (True, False):
        model = packed(cases.tiny_model("llama", torch.float32), dense)
        model.model.layers[1].mlp.down_proj.register_forward_hook(later)
        (record,) = measured(model, [LONG])
        assert record.reason is None
        values.append(record.coupling(2))
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_a_method_replaced_on_a_packed_layer_is_refused(model):
    layer = packed(model).model.layers[1].mlp.down_proj
    layer.forward = lambda x: PackedLinear.forward(layer, x) * 1.2
    with pytest.raises(CouplingError, match="forward method replaced on model.layers.1.mlp"):
        ResidualModel.wrap(model)


def with_same_weights(dtype):
    """A model, and one in float32 with its weights."""
    model, exact = cases.tiny_model("llama", dtype), cases.tiny_model("llama", torch.float32)
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    return model, exact


def hooked_by_ids(model):
    def add(module, args, output):
        return output + 3.0 * (args[0] == 7)[..., None].to(output)

    model.model.embed_tokens.register_forward_hook(add)


def patched_by_ids(model):
    table = model.model.embed_tokens
    look_up = table.forward
    table.forward = lambda ids: look_up(ids) + 3.0 * (ids == 7)[..., None].to(table.weight)


@pytest.mark.parametrize("change", [hooked_by_ids, patched_by_ids])
def test_functions_on_embeddings_are_given_token_ids(change):
    """In another dtype than the weights' they were given places among the rows looked up."""
    models = with_same_weights(torch.bfloat16)
    for model in models:
        change(model)
    prompts = [[5, 7, 9, 7], [5, 3, 9, 11]]
    for a, b in zip(*(measured(model, prompts) for model in models), strict=True):
        assert a.reason is b.reason is None
        # The table of rotary frequencies is in bf16 as well.
        assert a.coupling(2) == pytest.approx(b.coupling(2), abs=1e-3)


def test_an_adapter_of_single_tokens_is_measured_in_half_precision():
    """Its merged table stayed in bf16, and the model was refused."""
    peft = pytest.importorskip("peft")
    config = peft.TrainableTokensConfig(token_indices=[5, 7], init_weights=False)
    torch.manual_seed(0)
    half = peft.get_peft_model(cases.tiny_model("llama", torch.bfloat16), config).eval()
    exact = copy.deepcopy(half).float()
    for a, b in zip(*(measured(model, [[5, 3, 7]]) for model in (half, exact)), strict=True):
        assert a.reason is None and a.coupling(2) == pytest.approx(b.coupling(2), abs=1e-3)


def test_a_dynamic_rotary_table_that_was_edited_is_refused():
    """Every pass of ours began with the original table, so that the edit was never seen."""
    model = cases.tiny_model(
        "llama", torch.float32, rope_parameters=dict(ROPES["dynamic"]), max_position_embeddings=32
    )
    model.model.rotary_emb.inv_freq.mul_(0.3)
    with pytest.raises(CouplingError, match="dynamic rotary table was edited"):
        ResidualModel.wrap(model)


def test_routers_whose_logits_are_configured():
    """The loss of the router asked for the logits of blocks that a lens leaves out."""
    model = cases.tiny_model("mixtral", torch.float32)
    model.config.output_router_logits = True
    as_oracle(model)


def test_in_half_precision_the_trace_itself_is_compared():
    """Only a twin by the kernels that score was: it agreed, whatever had been traced."""
    wrapped = ResidualModel.wrap(cases.tiny_model("llama", torch.bfloat16))
    wrapped.blocks[1].register_forward_hook(lambda module, args, output: output * 1.3)
    with pytest.raises(Unmeasurable, match="when it scores this prompt"):
        wrapped.trace(LONG)


def test_a_branch_that_some_prompts_take_is_compared_on_each():
    """A block was compared with differences of its outputs at its first prompt alone."""
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).numpy()

    def branch(module, args, output):
        if output.shape[1] <= 8:
            return output
        return output + torch.from_numpy(output.detach().numpy() @ matrix).to(output)

    for prompts in ([SHORT, LONG], [LONG, SHORT]):
        model = cases.tiny_model("llama", torch.float32)
        model.model.layers[0].mlp.register_forward_hook(branch)
        for prompt, record in zip(prompts, measured(model, prompts), strict=True):
            assert (record.reason is None) == (prompt is SHORT)


class Switching(LlamaModel):
    """Adds a vector to prompts that hold a certain token, as remote code may."""

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is not None:
            return super().forward(inputs_embeds=inputs_embeds, **options)
        vectors = self.embed_tokens(input_ids)
        vectors = vectors + 2.0 * (input_ids == 59).any(1)[:, None, None]
        return super().forward(inputs_embeds=vectors, **options)


def test_classes_of_the_user_are_compared_on_every_prompt(model):
    model.model.__class__ = Switching
    prompts = [[5, 3, 7], [5, 59, 7, 4, 3], [5, 3, 7, 1, 2, 3]]
    alone = [measured(model, [prompt])[0].coupling(2) for prompt in prompts]
    together = [record.coupling(2) for record in measured(model, prompts)]
    assert together == pytest.approx(alone, abs=1e-6)


def test_a_hook_that_goes_by_the_passes_before_is_refused(model):
    class Average:
        mean = torch.zeros(24)

        def __call__(self, module, args, output):
            self.mean = 0.9 * self.mean + 0.1 * output.mean((0, 1)).detach()
            return output - self.mean

    model.model.layers[0].register_forward_hook(Average())
    with pytest.raises(CouplingError, match="expected the same"):
        ResidualModel.wrap(model)


@pytest.mark.parametrize("whole", [True, False])
def test_dropout_is_off_while_a_model_in_training_mode_is_measured(whole, caplog):
    expected = measured(cases.tiny_model("gpt2", torch.float32), [SHORT])[0].coupling(2)
    model = cases.tiny_model("gpt2", torch.float32)
    chosen = [m for m in model.modules() if whole or isinstance(m, nn.Dropout)]
    for module in chosen:
        module.training = True
    with caplog.at_level("WARNING", "lm_eval.coupling"):
        (record,) = measured(model, [SHORT])
    assert record.coupling(2) == pytest.approx(expected, abs=1e-6)
    assert "call model.eval()" in caplog.text and all(m.training for m in chosen)


def test_a_hook_on_steps_of_decoding_is_seen_in_responses(model):
    """One pass over prompt and response does not run it, while the response was written with it."""
    wrapped = ResidualModel.wrap(model)
    wrapped.require_same_when_generated(LONG, 6)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.0)
    ResidualModel.wrap(model).require_same_when_generated(LONG, 6)
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + (output.shape[1] == 1)
    )
    with pytest.raises(Unmeasurable, match="otherwise on steps of decoding"):
        ResidualModel.wrap(model).require_same_when_generated(LONG, 6)


def test_a_hook_in_training_mode_alone_is_refused(model):
    """The model was scored with the hook, and measured without it."""
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: output * 2 if module.training else None
    )
    ResidualModel.wrap(model)
    with pytest.raises(CouplingError, match=r"in training mode, .* call model.eval\(\)"):
        ResidualModel.wrap(model.train())


def test_dropout_of_a_hook_is_dropout(model, caplog):
    expected = measured(cases.tiny_model("llama", torch.float32), [SHORT])[0].coupling(2)
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: nn.functional.dropout(output, 0.5, module.training)
    )
    with caplog.at_level("WARNING", "lm_eval.coupling"):
        (record,) = measured(model.train(), [SHORT])
    assert record.coupling(2) == pytest.approx(expected, abs=1e-6)
    assert "coupling is measured without dropout" in caplog.text


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("where", ["", "mlp"])
def test_a_hook_that_goes_by_recorded_gradients_is_refused(model, recorded, where):
    """Scores are taken without gradients, Jacobians with them."""
    model.model.layers[1].get_submodule(where).register_forward_hook(
        lambda module, args, output: output + 1 if torch.is_grad_enabled() == recorded else None
    )
    with pytest.raises(CouplingError, match="block 1 gives another output while gradients are"):
        ResidualModel.wrap(model)


MODES = {
    "inference_mode": torch.is_inference_mode_enabled,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_hook_that_goes_by_a_mode_of_torch_is_refused(dtype, mode, inside):
    """Scores may be taken in such a mode; Jacobians never are."""
    model = cases.tiny_model("llama", dtype)
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * 3 if MODES[mode]() == inside else None
    )
    with pytest.raises(CouplingError, match=f"under torch.{mode}, expected the same"):
        ResidualModel.wrap(model)


def test_a_mode_that_matters_at_later_tokens_is_seen_in_long_prompts(model):
    def later_under_inference(module, args, output):
        return later(module, args, output) if torch.is_inference_mode_enabled() else None

    model.model.layers[0].mlp.register_forward_hook(later_under_inference)
    short, long = measured(model, [SHORT, LONG])
    assert short.reason is None and "under torch.inference_mode" in long.reason


def test_passes_in_other_modes_leave_nothing_in_the_model(model):
    """A tensor of inference mode that a hook keeps would end the user's next training step."""
    part = model.model.layers[0].mlp

    def keep(module, args, output):
        module.last = output

    part.register_forward_hook(keep)
    assert measured(model, [SHORT])[0].reason is None
    assert not part.last.is_inference() and not torch.is_autocast_enabled("cpu")


def by_position(args, kwargs):
    return len(args) > 1


def by_name(args, kwargs):
    return "attention_mask" in kwargs


def with_cache(args, kwargs):
    values = [*args, *kwargs.values()]
    return any(type(value).__name__ == "DynamicCache" for value in values)


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("acts", [by_position, by_name])
def test_hooks_see_arguments_by_position_as_the_model_gives_them(case, acts):
    """Replays gave all arguments by name, and hooks saw others than in scoring."""
    model = cases.tiny_model(case, torch.float32)
    block = ResidualModel.wrap(model).block_list[1].module
    block = next(part for part in model.modules() if type(part) is type(block))
    styles = set()

    def hook(module, args, kwargs):
        styles.add((len(args), acts(args, kwargs)))
        stream = args[0] if args else kwargs["hidden_states"]
        if acts(args, kwargs):
            return ((stream + 0.3, *args[1:]), kwargs) if args else None

    block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(TOKENS)
    assert len(styles) == 1
    as_oracle(model)
    assert len(styles) == 1


def test_a_hook_that_acts_with_a_cache_alone_is_refused(model):
    """lm-eval scores with a cache, which our passes have not."""

    def hook(module, args, kwargs):
        return ((args[0] * 1.5, *args[1:]), kwargs) if with_cache(args, kwargs) else None

    model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    (record,) = measured(model, [SHORT])
    assert record.singular_values is None and "when it scores this prompt" in record.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_hook_that_goes_by_the_dtype_is_refused(dtype, inside, layer):
    """Its part of the stream was taken for a difference of rounding."""
    model = cases.tiny_model("llama", dtype)
    model.model.layers[layer].mlp.register_forward_hook(
        lambda module, args, output: output * 1.5 if (output.dtype == dtype) == inside else None
    )
    try:
        reason = measured(model, [LONG])[0].reason or ""
    except CouplingError as refusal:
        reason = str(refusal)
    assert f"block {layer} in torch.float32 is off by" in reason or "when it is scored" in reason


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2", "gemma2"])
def test_a_hook_of_one_form_in_every_dtype_is_measured(case):
    model = cases.tiny_model(case, torch.bfloat16)
    for module in model.modules():
        if type(module).__name__.lower().endswith(("mlp", "moeblock")):
            module.register_forward_hook(later)
    prompts = [cases.tiny_tokens(seq)[0].tolist() for seq in (6, 21, 40)]
    assert [record.reason for record in measured(model, prompts)] == [None] * 3


def for_several(module, args, output):
    return output * 3 if len(output) > 1 else None


def first_row(module, args, output):
    output = output.clone()
    output[0] *= 1.5
    return output


def second_row_without_numbers(module, args, output):
    output = output.clone()
    output[1:] *= math.nan
    return output


@pytest.mark.parametrize("hook", [for_several, first_row, second_row_without_numbers])
def test_a_hook_that_goes_by_the_place_in_a_batch_is_refused_if_scores_have_one(model, hook):
    """Prompts are measured alone, and scored in batches unless batch_size is 1."""
    model.model.layers[1].mlp.register_forward_hook(hook)
    wrapped = ResidualModel.wrap(model)
    wrapped.scored.follow_scoring(in_batches=False)
    assert measure_coupling(wrapped, [SHORT], ranks=(2,), progress=False)[0].reason is None
    with pytest.raises(CouplingError, match="in a batch of two, expected the same as alone"):
        wrapped.scored.follow_scoring(in_batches=True)


def test_places_in_a_batch_that_matter_at_later_tokens_are_seen_in_long_prompts(model):
    def hook(module, args, output):
        return later(module, args, output) if len(output) > 1 else None

    model.model.layers[1].mlp.register_forward_hook(hook)
    wrapped = ResidualModel.wrap(model)
    wrapped.scored.follow_scoring(in_batches=True)
    short, long = measure_coupling(wrapped, [SHORT, LONG], ranks=(2,), progress=False)
    assert short.reason is None and "in a batch of two" in long.reason


@pytest.mark.parametrize(("hook", "warns"), [(steer, True), (later, False)])
def test_a_token_that_text_behind_it_changes_is_warned_of(model, hook, warns, caplog):
    """Log-likelihoods are scored with the continuation behind the prompt."""
    model.model.layers[0].mlp.register_forward_hook(hook)
    wrapped = ResidualModel.wrap(model)
    wrapped.scored.follow_scoring(in_batches=True)
    full = [*LONG, *LONG, *LONG, 5]  # the model's window
    for record in measure_coupling(wrapped, [full, SHORT, LONG], ranks=(2,), progress=False):
        assert record.reason is None
    assert caplog.text.count("once text follows it") == warns


def hide_first_key(module, args, kwargs):
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"][..., 1:, 0] = torch.finfo(torch.float32).min


def halve_cosines(module, args, kwargs):
    kwargs["position_embeddings"][0].mul_(0.5)


def scale_stream(module, args, kwargs):
    (args[0] if args else kwargs["hidden_states"]).mul_(1.5)


@pytest.mark.parametrize(
    ("edit", "argument"),
    [
        (hide_first_key, "attention_mask"),
        (halve_cosines, "position_embeddings"),
        (scale_stream, "hidden_states"),
    ],
)
def test_arguments_that_a_hook_changes_in_place_are_named(model, edit, argument):
    """The refusal said that a block does not hand its output on."""
    model.model.layers[1].register_forward_pre_hook(edit, with_kwargs=True)
    with pytest.raises(CouplingError, match=f"a hook at block 1 that changes {argument} in place"):
        ResidualModel.wrap(model)


def test_a_mask_that_is_changed_before_all_blocks_is_measured(model):
    model.model.layers[0].register_forward_pre_hook(hide_first_key, with_kwargs=True)
    as_oracle(model)
