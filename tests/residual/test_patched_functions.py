"""Functions of libraries are remembered; whatever a user does to one must be seen the next time."""

import functools
import types

import pytest
import torch
from transformers.models.llama import modeling_llama

from lm_eval_coupling.residual.patched_functions import patched_functions

NORM = modeling_llama.LlamaRMSNorm


def found():
    places = (place for place, _ in patched_functions([("norm", NORM(4))]))
    return {place.removeprefix("forward pass's function ") for place in places}


def ours(*args, **kwargs):
    return args[-1]


@pytest.fixture(autouse=True)
def before():
    """What is there already, such as functions that the tests put into other modules."""
    return found()


@pytest.mark.parametrize(
    ("holder", "name", "place"),
    [
        (NORM, "forward", "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward"),
        (modeling_llama, "rotate_half", "transformers.models.llama.modeling_llama.rotate_half"),
        (torch.nn.functional, "silu", "torch.nn.functional.silu"),
    ],
)
@pytest.mark.parametrize("make", [lambda: ours, lambda: functools.partial(ours, 1)])
def test_a_function_put_there_and_taken_away(holder, name, place, make, before, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, make())
        assert found() - before == {place}
        assert found() - before == {place}  # remembered as well
    assert found() == before


def test_code_put_into_a_librarys_own_function(before, monkeypatch):
    place = "transformers.models.llama.modeling_llama.rotate_half"
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.rotate_half, "__code__", ours.__code__)
        assert found() - before == {place}
    assert found() == before


def test_code_put_into_a_function_that_a_library_has_decorated(before, monkeypatch):
    inner = modeling_llama.LlamaRMSNorm.forward
    decorated = functools.wraps(inner)(types.FunctionType(inner.__code__, {}))
    with monkeypatch.context() as patch:
        patch.setattr(NORM, "extra_repr", decorated)
        assert found() == before
        patch.setattr(inner, "__code__", ours.__code__)
        name = "transformers.models.llama.modeling_llama.LlamaRMSNorm"
        assert found() - before == {f"{name}.extra_repr", f"{name}.forward"}


def test_a_function_under_another_name(before, monkeypatch):
    monkeypatch.setattr(NORM, "first", ours, raising=False)
    assert {place.rpartition(".")[2] for place in found() - before} == {"first"}
    monkeypatch.delattr(NORM, "first")
    monkeypatch.setattr(NORM, "second", ours, raising=False)
    assert {place.rpartition(".")[2] for place in found() - before} == {"second"}
