"""The token that an image classifier reads, at which its coupling is measured."""

from __future__ import annotations

import math

import torch

from lm_eval_coupling.residual import ResidualModel

_STANDS_OUT = 1.5  # times as strong as a patch; of several summary tokens, the first is taken


def summary_token(model: ResidualModel) -> tuple[int, str]:
    """Choose the class token if the answer depends on it, else a patch in the middle.

    One backward pass compares the derivatives of the answer with respect to the tokens' streams
    after the last block.

    Returns:
        The index of the token, and a description of it.
    """
    stream = model.trace(model.inputs.probe).resid_final.clone().requires_grad_(True)
    with torch.enable_grad():
        answer = model.answer(stream)
        direction = torch.randn(answer.shape, generator=torch.Generator().manual_seed(0)).to(answer)
        (gradient,) = torch.autograd.grad((answer * direction).sum(), stream)
    strength, seq = gradient[0].norm(dim=-1), stream.shape[1]
    middle = min(seq // 2 + math.isqrt(seq) // 2, seq - 1)
    if strength[0] > _STANDS_OUT * strength[middle]:
        return 0, "the class token"
    return (
        middle,
        f"token {middle} of {seq}, a patch in the middle of the image, "
        "as the model reads all patches alike",
    )
