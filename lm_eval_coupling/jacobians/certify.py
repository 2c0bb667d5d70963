"""Every Jacobian is compared with the model's own derivative before it is used."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def certify(call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int) -> float:
    """Relative error of uᵀJ against one backward pass through the whole block, for a fixed random u.

    Args:
        call: a :class:`~lm_eval_coupling.residual.BlockCall`, inside its ``ready()`` context.
        jacobian: J of the block *without* its skip connection.
        output_token: absolute index.
        input_token: absolute index.

    Returns:
        ‖uᵀJ − ∂(u·f)/∂x‖ / ‖∂(u·f)/∂x‖, 0 where both are zero, infinity where only the model's is, NaN for a
        Jacobian that is not finite.
    """
    generator = torch.Generator().manual_seed(call.layer)
    u = torch.randn(jacobian.shape[0], generator=generator, dtype=torch.float64).to(jacobian)
    resid_pre = call.resid_pre.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = (call(resid_pre)[0, output_token] * u).sum()
        (grad,) = torch.autograd.grad(loss, resid_pre)
    truth = grad[0, input_token]
    if output_token == input_token:
        truth = truth - u
    error, scale = (u @ jacobian - truth).norm(), truth.norm()
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return (error / scale).item()
