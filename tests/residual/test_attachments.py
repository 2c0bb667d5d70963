"""Hooks, replaced methods, buffers and attributes are part of a model's identity."""

import datetime
import decimal
import fractions
import functools
import os
import random
import runpy
import subprocess
import sys
import threading
import types
from collections import deque
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.attachments import attachments_of
from lm_eval_coupling.residual.fingerprint import fingerprint

VECTOR = torch.arange(24.0)


@pytest.fixture
def model():
    return cases.tiny_model("llama", torch.float32)


def add(scale, module, args, output):
    return output + scale * VECTOR


LIBRARY = """
def make(vector):
    def hook(module, args, output):
        return output + vector
    return hook
"""


@functools.cache
def library():
    """Return a module whose code lies beside torch, as that of an installed package."""
    file = Path(torch.__file__).parents[1] / "steering_library.py"
    module = types.ModuleType("steering_library")
    exec(compile(LIBRARY, str(file), "exec"), vars(module))
    return module


class Steering:
    def __init__(self, vector):
        self.vector = vector

    def hook(self, module, args, output):
        return output + self.vector


def by_closure(block, value):
    vector = value * torch.ones(24)
    block.register_forward_hook(lambda module, args, output: output + vector)


def by_default(block, value):
    block.register_forward_hook(lambda module, args, output, s=value: output + s)


def by_partial(block, value):
    block.register_forward_hook(functools.partial(add, value))


def by_method(block, value):
    block.register_forward_hook(Steering(value * torch.ones(24)).hook)


def by_array(block, value):
    array = np.full(24, value, dtype=np.float32)
    block.register_forward_hook(lambda module, args, output: output + torch.from_numpy(array))


def by_module(block, value):
    scale = nn.Linear(24, 24, bias=False)
    scale.weight.data = value * torch.eye(24)
    block.register_forward_hook(lambda module, args, output: output + scale(output))


def by_nested_function(block, value):
    def scaled(x):
        return value * x

    def outer(module, args, output):
        def inner(x):
            return x + scaled(x)

        return inner(output)

    block.register_forward_hook(outer)


def by_pre_hook(block, value):
    block.register_forward_pre_hook(lambda module, args: (args[0] + value, *args[1:]))


def by_method_of_the_object(block, value):
    before = block.mlp.forward
    block.mlp.forward = lambda x: value * before(x)


def by_attribute(block, value):
    block.strength = value
    block.register_forward_hook(lambda module, args, output: output + module.strength)


def by_plain_number_of_a_module(block, value):
    block.input_layernorm.variance_epsilon = value


def by_tensor_attribute(block, value):
    block.offset = value * torch.ones(24)


def by_buffer(block, value):
    block.register_buffer("mask", torch.full((24,), value))


def by_computed_buffer(block, value):
    block.register_buffer("mask", torch.full((24,), value), persistent=False)


def by_decorated_function(block, value):
    vector = value * torch.ones(24)

    @torch.no_grad()
    def hook(module, args, output):
        output += vector

    block.register_forward_hook(hook)


def by_closure_of_a_library(block, value):
    block.register_forward_hook(library().make(value * torch.ones(24)))


def by_attribute_of_the_function(block, value):
    def hook(module, args, output):
        return output + hook.strength

    hook.strength = value
    block.register_forward_hook(hook)


def by_object_of_c(block, value):
    strength = decimal.Decimal(value)
    block.register_forward_hook(lambda module, args, output: output + float(strength))


class Holder(dict):
    """A container with an attribute, and an array of another library's."""

    def __array__(self, dtype=None, copy=None):
        return np.full(24, self.strength, np.float32)


def by_attribute_of_a_container(block, value):
    holder = Holder()
    holder.strength = value
    block.register_forward_hook(lambda module, args, output: output + holder.strength)


def by_dictionary_with_a_dtype(block, value):
    block.steering = {"strength": value, "dtype": torch.float32}


def by_namespace(block, value):
    block.steering = types.SimpleNamespace(strength=value)


@pytest.mark.parametrize(
    "attach", [f for name, f in list(globals().items()) if name.startswith("by_")]
)
def test_what_is_attached_counts(model, attach):
    """Each had the plain model's fingerprint, and the store gave the plain model's numbers."""
    plain = fingerprint(model)
    prints = []
    for value in (0.25, 0.25, 0.5):
        other = cases.tiny_model("llama", torch.float32)
        attach(other.model.layers[1], value)
        prints.append(fingerprint(other))
    assert prints[0] == prints[1] and len({plain, *prints}) == 3


@pytest.mark.parametrize(
    "kind",
    [
        *(lambda x: frozenset({x}), lambda x: deque([x])),
        *(lambda x: str(x).encode(), lambda x: bytearray(str(x).encode()), complex, slice),
        *(lambda x: range(int(4 * x)), decimal.Decimal, fractions.Fraction, Path, str),
        *(datetime.timedelta, lambda x: types.MappingProxyType({"a": x}), lambda x: (None, x)),
    ],
)
def test_an_attribute_of_any_kind_of_python_counts(model, kind):
    """A hook that read a frozenset had one fingerprint whatever was in it."""
    prints = [fingerprint(model)]
    for value in (0.25, 0.5, 0.5):
        model.model.layers[1].steering = kind(str(value) if kind is Path else value)
        prints.append(fingerprint(model))
    assert prints[2] == prints[3] and len({*prints}) == 3


def test_an_ordinary_model_has_nothing_attached(tmp_path):
    """Also after it was saved, loaded, run, and generated from."""
    model = cases.tiny_model("llama", torch.float32)
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.train().eval()
    with torch.no_grad():
        loaded.generate(cases.tiny_tokens(5), max_new_tokens=3, pad_token_id=0)
    assert not attachments_of(loaded) and fingerprint(loaded) == before


def test_a_class_that_was_patched_counts(model, monkeypatch):
    """A patch of a class, or of a function of transformers, acts on all models of the process."""
    before = fingerprint(model)
    kind = type(model.model.layers[0].mlp)
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: right(self, x) * 1.5)
    patched = fingerprint(model)
    monkeypatch.undo()
    module = sys.modules[kind.__module__]
    turn = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *rest: turn(q, k, *rest))
    assert len({before, patched, fingerprint(model)}) == 3


def test_counters_do_not_hide_what_stands_beside_them(model):
    state = {"passes": 0, "vector": torch.ones(24)}

    def hook(module, args, output):
        state["passes"] += 1
        return output + state["vector"]

    model.model.layers[0].register_forward_hook(hook)
    wrapped = ResidualModel.wrap(model)
    assert wrapped.describe_change() is None
    state["vector"][0] = 2
    assert "vector" in wrapped.describe_change()


class Counting:
    def __init__(self):
        self.state = {"passes": 0, "strength": 0.5}

    def __call__(self, module, args, output):
        self.state["passes"] += 1
        return output + self.state["strength"] * VECTOR


def counting_in_a_list(state):
    def hook(module, args, output):
        state[0] += 1
        return output + state[1] * VECTOR

    return hook


@pytest.mark.parametrize("kind", ["nested", "list", "partial"])
def test_counters_hide_nothing_at_any_depth(model, kind):
    """The whole container counted as one that passes change, and was not looked at again."""
    hook = Counting()
    state, place = hook.state, "strength"
    if kind != "nested":
        state, place = [0, 0.5], 1
        hook = counting_in_a_list(state)
    if kind == "partial":
        hook = functools.partial(lambda inner, *call: inner(*call), hook)
    model.model.layers[0].register_forward_hook(hook)
    wrapped = ResidualModel.wrap(model)
    assert wrapped.describe_change() is None
    state[place] = 2.0
    assert wrapped.describe_change() is not None


def by_variable(model):
    return lambda module, args, output: output + model.strength * VECTOR


def by_getattr(model):
    return lambda module, args, output: output + getattr(model, "strength") * VECTOR  # noqa: B009


class ByMember:
    def __init__(self, model):
        self.model = model

    def __call__(self, module, args, output):
        return output + self.model.strength * VECTOR


@pytest.mark.parametrize("make", [by_variable, by_getattr, ByMember])
def test_notes_on_the_model_count_where_functions_read_them(model, make):
    """Loading writes such notes as well, which change nothing."""
    model.strength = model.note = 0.5
    model.model.layers[0].register_forward_hook(make(model))
    wrapped = ResidualModel.wrap(model)
    model.note = 2.0
    assert wrapped.describe_change() is None
    model.strength = 2.0
    assert wrapped.describe_change().endswith("strength")
    assert ResidualModel.wrap(model).fingerprint != wrapped.fingerprint


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_class_of_the_user_counts(model):
    """A fresh model of the class is made as well: nothing differed from it."""
    plain = fingerprint(model)
    model.__class__ = Doubled
    doubled = fingerprint(model)
    right = Doubled.forward
    try:
        Doubled.forward = lambda self, *args, **kwargs: right(self, *args, **kwargs)
        assert len({plain, doubled, fingerprint(model)}) == 3
    finally:
        Doubled.forward = right
    assert fingerprint(model) == doubled


@pytest.mark.parametrize("name", ["silu", "scaled_dot_product_attention"])
@pytest.mark.parametrize("by", ["user", "library", "partial"])
def test_functions_put_into_torch_count(model, monkeypatch, name, by):
    before = fingerprint(model)
    right = getattr(nn.functional, name)

    def other(*args, **kwargs):
        return right(*args, **kwargs)

    made = {"user": other, "library": library().make(0.5), "partial": functools.partial(other)}
    monkeypatch.setattr(nn.functional, name, made[by])
    assert fingerprint(model) != before


def test_what_wraps_a_function_of_a_library_is_the_users(model):
    """`functools.wraps` gives it the other's name and module."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model.set_attn_implementation("sdpa")
    before = fingerprint(model)

    @functools.wraps(sdpa_attention_forward)
    def gated(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return 0.5 * output, weights

    right = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", gated)
        registered = fingerprint(model)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", right)
    model.model.layers[0].register_forward_hook(functools.wraps(nn.Module.forward)(steer))
    assert len({before, registered, fingerprint(model)}) == 3


def steer(module, args, output):
    return output + VECTOR


@pytest.mark.parametrize("case", cases.CASES)
def test_no_family_has_anything_attached(case):
    model = cases.tiny_model(case, torch.float32)
    with torch.no_grad():
        model(cases.tiny_tokens(9))
    assert not attachments_of(model)


def test_a_rotary_table_that_was_edited_counts(model):
    before = fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert fingerprint(model) != before


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_table_that_passes_write_does_not_count(kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 3, "long_factor": [1.0, 3.0, 9.0]}
        rope["original_max_position_embeddings"] = 8
    model = cases.tiny_model(
        "llama", torch.float32, rope_parameters=rope, max_position_embeddings=8
    )
    before = fingerprint(model)
    wrapped = ResidualModel.wrap(model)
    with torch.no_grad():
        model(cases.tiny_tokens(20))
    assert fingerprint(model) == before and wrapped.describe_change() is None


def test_a_global_that_a_hook_uses_is_followed(model, monkeypatch):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + VECTOR / 100)
    wrapped = ResidualModel.wrap(model)
    assert wrapped.fingerprint and wrapped.describe_change() is None
    monkeypatch.setitem(globals(), "VECTOR", VECTOR + 1)
    assert "forward hook" in wrapped.describe_change()


def test_a_vector_edited_in_place_is_followed(model):
    steering = Steering(torch.ones(24))
    model.model.layers[0].register_forward_hook(steering.hook)
    wrapped = ResidualModel.wrap(model)
    steering.vector[3] += 0.25
    assert wrapped.describe_change().endswith("self.vector")


def test_a_hook_in_place_of_another_is_followed(model):
    handle = model.model.layers[0].register_forward_hook(Steering(torch.ones(24)).hook)
    wrapped = ResidualModel.wrap(model)
    handle.remove()
    model.model.layers[0].register_forward_hook(Steering(torch.zeros(24)).hook)
    assert wrapped.describe_change() is not None


def test_what_a_collector_collects_is_no_change(model):
    """Its list grows at every pass; it is the same model at every evaluation."""
    kept, counts = [], {"passes": 0}

    def collect(module, args, output):
        counts["passes"] += 1
        kept.append(output.detach().numpy())

    model.model.layers[0].register_forward_hook(collect)
    wrapped = ResidualModel.wrap(model)
    taken = wrapped.fingerprint
    with torch.no_grad():
        model(cases.tiny_tokens(9))
    assert wrapped.describe_change() is None
    kept.clear()
    assert ResidualModel.wrap(model).fingerprint == taken


def test_what_cannot_be_read_makes_a_model_of_its_own(model, caplog):
    """A generator's state, for example, decides about the next pass and cannot be seen."""
    vectors = (torch.zeros(24) for _ in range(10**6))
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + next(vectors))
    with caplog.at_level("WARNING", "lm_eval.coupling"):
        a, b = ResidualModel.wrap(model), ResidualModel.wrap(model)
    assert a.fingerprint != b.fingerprint and a.fingerprint == a.fingerprint
    assert "generator" in a.unreadable and a.describe_change() is not None
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert "for this run alone" in caplog.text


def of_a_file(module, args, output):
    return output + float(Path(os.environ["STRENGTH_FILE"]).read_text()) * VECTOR


def of_chance(module, args, output):
    return output + torch.randn_like(output)


class OfTheEnvironment:
    def __call__(self, module, args, output):
        return output + float(os.environ["STRENGTH"]) * VECTOR


def of_a_helper(module, args, output):
    return of_a_file(module, args, output)


class OfAMethod:
    def vector(self):
        return torch.load("vector.pt")

    def __call__(self, module, args, output):
        return output + self.vector()


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (of_a_file, "read_text"),
        (of_a_helper, "read_text"),
        (of_chance, "randn_like"),
        (OfTheEnvironment(), "environ"),
        (OfAMethod(), "load"),
    ],
)
def test_a_hook_that_reads_from_outside_makes_a_model_of_its_own(model, hook, name):
    """The store gave the numbers of the strength that the file had before."""
    model.model.layers[0].register_forward_hook(hook)
    assert any(f"call of {name}" in words for words in attachments_of(model).unreadable)
    assert fingerprint(model) != fingerprint(model)


class Loaded(Steering):
    @classmethod
    def of_file(cls, path):
        return cls(torch.load(path))


def test_a_class_may_have_a_method_that_reads(model):
    """Hooks do not call it."""
    model.model.layers[0].register_forward_hook(Loaded(torch.ones(24)).hook)
    assert not attachments_of(model).unreadable


def test_locks_files_and_random_states_can_be_read(model):
    lock, source = threading.Lock(), random.Random(3)

    def hook(module, args, output):
        with lock:
            return output + source.random() * 0

    model.model.layers[0].register_forward_hook(hook)
    assert not attachments_of(model).unreadable


def test_a_registered_attention_function_counts(model):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    before = fingerprint(model)
    prints = set()
    for factor in (0.5, 0.25):

        def scaled(module, query, key, value, mask, factor=factor, **options):
            return sdpa_attention_forward(module, factor * query, key, value, mask, **options)

        AttentionInterface.register("scaled", scaled)
        model.set_attn_implementation("scaled")
        prints.add(fingerprint(model))
    assert len({before, *prints}) == 3


def test_a_hook_on_every_module_counts(model):
    before = fingerprint(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert fingerprint(model) != before
    finally:
        handle.remove()


class Settings:
    strength = 0.5
    places = (1, 2)
    inner = types.SimpleNamespace(strength=0.5)


def test_settings_that_a_hook_reads_are_followed(model, monkeypatch):
    """Attributes of a class, or of a Python module, that are no variables of the hook."""
    settings = types.ModuleType("steering_settings")
    settings.strength = 0.5
    monkeypatch.setitem(globals(), "settings", settings)
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + Settings.strength + globals_strength()
    )

    def globals_strength():
        return settings.strength

    wrapped = ResidualModel.wrap(model)
    assert wrapped.describe_change() is None
    monkeypatch.setattr(Settings, "places", (1, 2, 3))
    assert wrapped.describe_change() is not None
    monkeypatch.setattr(Settings, "places", (1, 2))
    assert wrapped.describe_change() is None
    Settings.inner.strength = 2.0
    assert wrapped.describe_change() is not None


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.factor * self.inner(x)


def test_a_module_put_around_another_counts(model):
    before = fingerprint(model)
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp, 1.5)
    wrapped = ResidualModel.wrap(model)
    assert wrapped.fingerprint != before
    model.model.layers[0].mlp.factor = 2.0
    assert wrapped.describe_change().endswith("factor")


def test_the_active_adapter_counts(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.add_adapter("other", config)
    first = fingerprint(adapted)
    adapted.set_adapter("other")
    second = fingerprint(adapted)
    adapted.set_adapter("default")
    assert fingerprint(adapted) == first != second


def test_each_look_compares_with_the_configuration_of_that_moment(model):
    """What a configuration makes is kept between looks, until the configuration changes."""
    assert not attachments_of(model)
    model.config.attention_dropout = 0.5
    assert any(place.endswith("attention_dropout") for place in attachments_of(model))
    model.config.attention_dropout = 0.0
    assert not attachments_of(model)


HOOKED = """
import cases, torch
from lm_eval_coupling.residual.fingerprint import fingerprint
model = cases.tiny_model("llama", torch.float32)
layers, names = {0, 1}, {"a": 1, "b": 2}
class Recorder:
    def __init__(self): self.seen, self.names = set("xyz"), names
    def look(self, module, args, output): return output * (1 + len(layers) * torch.ones(24)[0])
model.model.layers[0].register_forward_hook(Recorder().look)
print(fingerprint(model))
"""


def test_every_process_computes_the_same(tmp_path, capsys):
    """Whatever order sets have there, and wherever functions lie in memory."""
    script, support = tmp_path / "hooked.py", Path(__file__).parents[1] / "support"
    script.write_text(HOOKED)
    runpy.run_path(str(script), run_name="__main__")
    # Sets have another order there than here, where the seed is random.
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(support)}
    there = subprocess.check_output([sys.executable, script], env=environment, text=True)
    assert there == capsys.readouterr().out != ""
