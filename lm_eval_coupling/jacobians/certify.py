"""Every Jacobian is compared with the model's own derivative before it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def certify(call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int) -> float:
    """Relative error of uᵀJ against one backward pass through the whole block, for its fixed random u.

    J is what remains of ∂F when the identity is taken off. Where it is tiny beside that identity, its rounding is what it
    is compared with: a certificate below ``TOLERANCE`` then means an absolute error of at most four roundings of 1.

    Args:
        call: a :class:`~lm_eval_coupling.residual.BlockCall`, inside its ``ready()`` context.
        jacobian: J of the block *without* its skip connection.
        output_token: absolute index.
        input_token: absolute index.

    Returns:
        ‖uᵀJ − ∂(u·f)/∂x‖ / max(‖∂(u·f)/∂x‖, 4 eps ‖u‖ / tolerance), NaN for a Jacobian that is not finite.
    """
    pulled = call.pulled_back(output_token, input_token)
    return _relative_error(call, jacobian, pulled - call.probe if output_token == input_token else pulled)


def certify_each(calls: Sequence, jacobians: Float[Tensor, "prompt d_model d_model"], tokens: Sequence[int]) -> list[float]:
    """:func:`certify` of one block's J_tt for several prompts, each at its own token t."""
    pulled = calls[0].pulled_back_each(calls, tokens)
    return [_relative_error(call, J, p - call.probe) for call, J, p in zip(calls, jacobians, pulled, strict=True)]


def _relative_error(call, jacobian: Tensor, truth: Tensor) -> float:
    u = call.probe
    rounding = 4 * torch.finfo(call.dtype).eps * u.norm() / TOLERANCE[call.dtype]
    return ((u @ jacobian - truth).norm() / torch.maximum(truth.norm(), rounding)).item()
