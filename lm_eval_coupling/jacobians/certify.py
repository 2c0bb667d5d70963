"""Every Jacobian is compared with the model's own derivative before it is used."""

from __future__ import annotations

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
    u, truth = call.probe, call.pulled_back(output_token, input_token)
    if output_token == input_token:
        truth = truth - u
    rounding = 4 * torch.finfo(call.dtype).eps * u.norm() / TOLERANCE[call.dtype]
    return ((u @ jacobian - truth).norm() / torch.maximum(truth.norm(), rounding)).item()
