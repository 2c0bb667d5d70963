"""Which token of an image a classifier reads: the one whose way through the blocks is measured."""

from __future__ import annotations

import math

import torch

from lm_eval_coupling.residual import ResidualModel

_STANDS_OUT = 1.5  # times as strong as a patch; of several summary tokens, the first is taken


def summary_token(model: ResidualModel) -> tuple[int, str]:
    """The class token if the model's answer depends on it more than on a patch, else a patch in the middle of the image.

    Found by what the model does: the derivative of its answer by the stream after the last block, one backward pass.

    Returns:
        The index of the token, and in words what it is.
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
        f"token {middle} of {seq}, a patch in the middle of the image, as the model reads all patches alike",
    )
