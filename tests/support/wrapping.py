"""Models as lm-eval loads them, and as they are measured where they are told to be."""

import copy
import functools

import cases
import torch

from lm_eval_coupling.residual import ResidualModel


def tiny(case="llama", dtype=torch.float32, **changes):
    """As lm-eval loads it: with fused attention."""
    attention = (
        "eager" if case in ("gemma2", "falcon-alibi") else "sdpa"
    )  # transformers has no, or another, fused one
    return cases.tiny_model(case, dtype, **{"attn_implementation": attention} | changes)


def wrapped_on(device, model, tokenizer=None):
    """Return a wrapped copy of the model on a device; the model itself stays with its oracle."""
    return ResidualModel.wrap(copy.deepcopy(model).to(device), tokenizer)


@functools.cache
def wrapped_once(case, device):
    """Return a family's model in float64, and a wrapped copy on a device, made once for all tests.

    Neither may be changed.
    """
    model = cases.tiny_model(case)
    return model, wrapped_on(device, model)
