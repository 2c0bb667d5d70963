"""Weights packed in 4 or 8 bits, offloaded, or on several devices count as their numbers.

The oracle of a packed model is a dense one with weights on the packing's grid: packing them loses
nothing.
"""

import copy
import os
import subprocess
from pathlib import Path

import cases
import pytest
import torch
from forked import forked_python
from oracles import oracle
from random_weights import with_lora
from torch import nn
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.paper import run_coupling_hf
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual import load_checks as checks
from lm_eval_coupling.residual import wrapping as ways
from lm_eval_coupling.residual.fingerprint import fingerprint
from lm_eval_coupling.residual.weights import named_weights, upcast

TOKENS = cases.tiny_tokens(9)
# bitsandbytes packs 64 numbers at a time; some processors' 4-bit kernel takes 32 rows at a time.
WIDE = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "phi3": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
    "gpt-neox": {"hidden_size": 64, "intermediate_size": 128},
}
NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4 = [float(value) for value in NF4.split()]
FP4 = [sign * x for sign in (-1, 1) for x in (0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1)]
INT8 = [k / 127 for k in range(-127, 128)]
PACKINGS = {
    "nf4": (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": (FP4, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "nf4 with packed scales": (
        NF4,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "int8": (INT8, {"load_in_8bit": True}),
}


def on_grid(model, grid):
    """Draw matrices from ``grid``, the largest once in 64 numbers: all scales are a power of 2."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(grid)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                p.copy_(grid[torch.randint(len(grid), p.shape, generator=generator)] / 4)
                p.view(-1, 64)[:, 0] = 0.25
                p[::64] = 0.25  # GPT-2's are packed transposed
    return model


@pytest.fixture
def packed(tmp_path):
    """A model and the same in packed form."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")

    def make(packing, case="llama", dtype=torch.float32):
        grid, options = PACKINGS[packing]
        dense = on_grid(cases.tiny_model(case, torch.float32, **WIDE[case]), grid)
        dense.save_pretrained(tmp_path / case)
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / case, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
        )
        assert any(p.element_size() == 1 for p in model.parameters())
        return dense, model.eval()

    return make


@pytest.mark.parametrize(
    ("packing", "case"),
    [
        *((packing, "llama") for packing in PACKINGS),
        ("nf4", "phi3"),
        ("nf4", "gpt2"),
        ("int8", "gpt-neox"),
    ],
)
def test_packed_weights_are_measured_as_what_they_stand_for(packed, packing, case):
    """Joint projections that TransformerLens splits, and transposed packed matrices, too."""
    dense, model = packed(packing, case)
    wrapped = ResidualModel.wrap(model)
    found = block_jacobians(wrapped, TOKENS)
    for layer in range(2):
        expected = oracle(dense, TOKENS, layer, 8, 8)
        assert (found.jacobians[layer] - expected).norm() < 1e-4 * expected.norm()
    assert found.method == ["closed", "closed"] and found.certificate.max() < 1e-5
    assert wrapped.n_params == sum(p.numel() for p in dense.parameters())


def test_a_packed_model_stays_as_it_was(packed):
    """Neither its outputs nor its weights change, whether it was run before or not."""
    _, model = packed("nf4", dtype=torch.bfloat16)
    _, untouched = packed("nf4", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = untouched(TOKENS).logits
        wrapped = ResidualModel.wrap(model)
        first = block_jacobians(wrapped, TOKENS).jacobians
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(block_jacobians(wrapped, TOKENS).jacobians, first)
        assert torch.equal(block_jacobians(ResidualModel.wrap(untouched), TOKENS).jacobians, first)
    for (name, one), (_, other) in zip(
        model.named_parameters(), untouched.named_parameters(), strict=True
    ):
        assert type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other), (
            name
        )


def test_one_block_is_unpacked_at_a_time(packed):
    _, model = packed("nf4")
    wrapped = ResidualModel.wrap(model)

    def unpacked():
        return [
            sum(p.untyped_storage().nbytes() > 1000 for p in block.parameters() if p.dim() == 2)
            for block in wrapped.blocks
        ]

    seen = []
    handles = [
        block.mlp.register_forward_hook(lambda *_: seen.append(unpacked()))
        for block in wrapped.blocks
    ]
    calls = wrapped.trace(TOKENS).calls
    for handle in handles:
        handle.remove()
    assert seen == [[7, 0], [0, 7]] and unpacked() == [0, 0]
    with calls[1].ready():
        assert unpacked() == [0, 7]
    assert unpacked() == [0, 0]


def test_an_adapter_on_packed_weights(packed):
    dense, model = packed("nf4")
    adapted = [with_lora(base, ["q_proj", "down_proj"]) for base in (dense, model)]
    expected, found = (block_jacobians(ResidualModel.wrap(m), TOKENS).jacobians for m in adapted)
    assert torch.allclose(found, expected, atol=1e-4)
    with adapted[0].disable_adapter():
        assert not torch.allclose(oracle(dense, TOKENS, 0, 8, 8), found[0], atol=1e-2)


def test_the_fingerprint_of_packed_weights(packed):
    _, model = packed("int8")
    _, again = packed("int8")
    ResidualModel.wrap(again)
    assert fingerprint(model) == fingerprint(again)
    changed = again.model.layers[1].mlp.down_proj
    scale = changed.weight.SCB if changed.state.SCB is None else changed.state.SCB
    scale[3] *= 2  # which is no parameter
    assert fingerprint(model) != fingerprint(again)


def test_the_papers_function_takes_packed_models(packed):
    class Tokenizer:
        def encode(self, text):
            return TOKENS[0].tolist()

    dense, model = packed("nf4")
    expected, found = (
        run_coupling_hf(m, Tokenizer(), "m", ["text"], ranks=[2, 4], last_layer_norm=True)
        for m in (dense, model)
    )
    for K in (2, 4):
        one, other = (out[0]["coupling_ujv"][K]["norm"] for out in (expected, found))
        assert torch.allclose(one, other, atol=1e-3)


class Scaled(torch.Tensor):
    """As torchao and quanto pack: a tensor of another class that knows its dense form."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def dequantize(self):
        return self.integers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        dense = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*dense, **(kwargs or {}))


def with_scaled_weights(model):
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            integers = (module.weight * 50).round().clamp(-127, 127).to(torch.int8)
            module.weight = nn.Parameter(Scaled(integers, 0.02), requires_grad=False)
    return model


def with_scaled_float8(model):
    """In transformers' own layer, which runs on GPUs only: here by its dense weight."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    class Linear(FP8Linear):
        def forward(self, x):
            return nn.functional.linear(x, by_hand(self).to(x))

    for parent in list(model.model.layers.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                layer = Linear(module.in_features, module.out_features, block_size=(16, 8))
                layer.weight = nn.Parameter(
                    (module.weight * 100).to(torch.float8_e4m3fn), requires_grad=False
                )
                layer.weight_scale_inv = nn.Parameter(
                    torch.rand_like(layer.weight_scale_inv) / 50, requires_grad=False
                )
                setattr(parent, name, layer)
    return model


def by_hand(module):
    """The dense weight, entry by entry from the parts."""
    if isinstance(getattr(module, "weight", None), Scaled):
        return module.weight.integers.double() * module.weight.scale
    if hasattr(module, "weight_scale_inv"):
        dense = module.weight.detach().double()
        for i in range(dense.shape[0]):
            for j in range(dense.shape[1]):
                dense[i, j] *= module.weight_scale_inv[i // 16, j // 8]
        return dense
    return None


@pytest.mark.parametrize(
    "pack", [with_scaled_weights, with_scaled_float8], ids=lambda f: f.__name__
)
def test_other_packings(pack):
    dense = cases.tiny_model("llama", torch.float32)
    model = pack(copy.deepcopy(dense))
    weights = {name: by_hand(module) for name, module in model.named_modules()}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    assert len(weights) >= 14
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight.float()
    found = block_jacobians(ResidualModel.wrap(model), TOKENS)
    for layer in range(2):
        expected = oracle(dense, TOKENS, layer, 8, 8)
        assert (found.jacobians[layer] - expected).norm() < 1e-4 * expected.norm()
    named = dict(named_weights(model))
    assert all(
        torch.allclose(named[f"{name}.weight"].double(), weight, atol=1e-6)
        for name, weight in weights.items()
    )


def offloaded(model, where, folder):
    """Offload as accelerate does: to the host, with the tables too, or to the disk."""
    import accelerate

    if where == "disk":
        return accelerate.disk_offload(model, folder, torch.device("cpu"))
    return accelerate.cpu_offload(
        model, torch.device("cpu"), offload_buffers=where == "host with buffers"
    )


@pytest.mark.parametrize("where", ["host", "host with buffers", "disk"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt-neox", "gemma3"])
def test_offloaded_weights_are_measured_as_if_they_were_there(case, where, tmp_path):
    """GPT-2's and Gemma's head is tied to the embeddings, which offloading unties."""
    model = cases.tiny_model(case, torch.bfloat16)
    wrapped = ResidualModel.wrap(model)
    expected, n_params = block_jacobians(wrapped, TOKENS).jacobians, wrapped.n_params
    mark, logits = fingerprint(model), model(TOKENS).logits
    moved = offloaded(copy.deepcopy(model), where, tmp_path / "offload")
    assert all(p.device.type == "meta" for p in moved.parameters())
    assert fingerprint(moved) == mark
    wrapped = ResidualModel.wrap(moved)
    assert torch.allclose(block_jacobians(wrapped, TOKENS).jacobians, expected, atol=1e-5)
    (found,) = measure_coupling(wrapped, [TOKENS[0].tolist()], ranks=(2,), progress=False)
    assert found.reason is None
    assert wrapped.n_params == n_params == sum(p.numel() for p in model.parameters())
    assert torch.equal(moved(TOKENS).logits, logits)
    assert all(p.device.type == "meta" for p in moved.parameters())


def test_the_final_norm_may_be_offloaded(tmp_path):
    class Tokenizer:
        def encode(self, text):
            return TOKENS[0].tolist()

    model = cases.tiny_model("llama", torch.float32)
    moved = offloaded(copy.deepcopy(model), "host", tmp_path)
    expected, found = (
        run_coupling_hf(m, Tokenizer(), "m", ["text"], ranks=[2], last_layer_norm=True)
        for m in (model, moved)
    )
    assert torch.allclose(
        expected[0]["coupling_ujv"][2]["norm"], found[0]["coupling_ujv"][2]["norm"], atol=1e-4
    )


def test_offloaded_weights_are_put_away_after_an_exception(tmp_path):
    wrapped = ResidualModel.wrap(
        offloaded(cases.tiny_model("llama", torch.float32), "host", tmp_path)
    )
    call = wrapped.trace(TOKENS).calls[0]
    with pytest.raises(RuntimeError, match="in the middle"), call.ready():
        assert all(p.untyped_storage().nbytes() >= p.numel() * 4 for p in call.module.parameters())
        raise RuntimeError("in the middle")
    assert all(p.untyped_storage().nbytes() == 4 for p in call.module.parameters())


def test_weights_that_are_nowhere_are_refused():
    model = cases.tiny_model("llama", torch.float32)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(
        CouplingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight on no device, expected"
    ):
        ResidualModel.wrap(model)


def test_a_block_on_several_devices_is_refused():
    wrapped = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    projection = wrapped.blocks[1].mlp.up_proj.original_component
    projection.weight = nn.Parameter(projection.weight.to("meta"))
    with pytest.raises(
        CouplingError,
        match=r"got block 1 spread over \['cpu', 'meta'\], expected each block on one device",
    ):
        checks.require_whole_blocks(wrapped.block_list)


def test_an_offloaded_model_that_is_bridged_wrongly_goes_by_its_own_blocks(monkeypatch, tmp_path):
    """The bridge is held to the model's own blocks even if only traces run the model."""
    model = offloaded(cases.tiny_model("llama", torch.float32), "host", tmp_path)
    expected = block_jacobians(ResidualModel.wrap(model), TOKENS).jacobians
    right = ways.put_bridge_into

    def wrong(twin):
        bridge = right(twin)
        bridge.blocks[0].original_component.mlp.up_proj.register_forward_hook(
            lambda module, args, output: -output
        )
        return bridge

    monkeypatch.setattr(ways, "put_bridge_into", wrong)
    wrapped = ResidualModel.wrap(model)
    assert (
        wrapped.wrapping == "blocks"
        and "TransformerLens' bridge of LlamaForCausalLM is off by" in wrapped.wrapping_reason
    )
    assert torch.allclose(block_jacobians(wrapped, TOKENS).jacobians, expected, atol=1e-5)


def test_upcast_puts_everything_back():
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    whole, integer = torch.ones(3), torch.ones(3, dtype=torch.int64)
    with upcast([half, whole, integer], torch.float32):
        assert (half.dtype, whole.dtype, integer.dtype) == (
            torch.float32,
            torch.float32,
            torch.int64,
        )
    assert half.dtype == torch.bfloat16


# Tensors without numbers, as torch.compile uses them: operands on two devices are an error there to
TWO_DEVICES = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("other")
import cases
from lm_eval_coupling import residual
from lm_eval_coupling.residual.arguments import SharedArguments
from lm_eval_coupling.jacobians.certify import probe, pulled_back
from lm_eval_coupling.jacobians.levels import LEVELS

mode = FakeTensorMode()  # one for all: directions are made once and kept
# Constants are no fake tensors, and there is no other device.
SharedArguments.indices = lambda self, key, device, make: make()

def place(module, device):
    for part in module.modules():
        kinds = ((part._parameters, torch.nn.Parameter), (part._buffers, lambda t, **_: t))
        for tensors, kind in kinds:
            for name, t in tensors.items():
                if t is not None:
                    empty = torch.empty(t.shape, dtype=t.dtype, device=device)
                    tensors[name] = kind(empty, requires_grad=False)

def walk(case):
    wrapped = residual.ResidualModel.wrap(cases.tiny_model(case, torch.float32))
    with mode:
        place(wrapped.model, "cpu")
        inner = getattr(wrapped.model, "model", None) or wrapped.model.transformer
        for part in (wrapped.blocks[1], getattr(inner, "norm", None) or inner.ln_f):
            place(part, "other:0")
        wrapped.inputs._row = lambda tokens: tokens  # which looks at the ids
        facts = {"inputs": wrapped.inputs, "n_params": 1, "wrapping": "", "wrapping_reason": ""}
        again = residual.ResidualModel(wrapped.model, wrapped.blocks, **facts)
        traced = again.trace(torch.ones(5, dtype=torch.long), torch.float32, 2, probe)
        for call, device in zip(traced.calls, ("cpu", "other:0")):
            assert str(call.resid_pre.device) == str(pulled_back(call, 2, 2).device) == device
            with call.ready():
                for level in ("token-local", "autodiff"):
                    assert str(LEVELS[level](call, 2, 2, 1 << 20).device) == device
        assert str(traced.trajectory(1).device) == "other:0"
        # The head is tied to the embeddings.
        assert str(again.logits(traced.trajectory(1)).device) == "cpu"

walk("llama")
walk("gpt2")  # whose norm TransformerLens does not call
SharedArguments.move = lambda self, tensor, device: tensor
try:
    walk("llama")
except RuntimeError as error:
    assert "other:0" in str(error), error
    print("WALKED")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch offers no stand-in for a second device",
)
def test_blocks_on_several_devices_are_measured_where_they_lie():
    """Without moving the stream to a block's device there would be an error: the test can fail."""
    tests = Path(__file__).parents[1] / "support"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parents[1])))}
    done = subprocess.run(
        [forked_python(), "-c", TWO_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "WALKED" in done.stdout, done.stderr[-3000:]
