"""Level ``autodiff``: reverse mode through the whole sequence. Any model; slow; the oracle of the other levels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.differentiate import jacobian_rows
from lm_eval_coupling.jacobians.protocol import Call


def autodiff_jacobian(call: Call, output_token: int, input_token: int, budget: int) -> Float[Tensor, "d_model d_model"]:
    """∂f_{output}/∂x_{input} of one block (skip connection excluded), by one backward pass per output coordinate.

    Arguments and result as in ``token_local_jacobian``; memory and time grow with the sequence although the result does not.

    Returns:
        Row = output coordinate, column = input coordinate, in the call's dtype.
    """

    def function(x: Tensor) -> Tensor:
        resid_pre = call.resid_pre.clone()
        resid_pre[0, input_token] = x
        return call(resid_pre)[0, output_token]

    jacobian = jacobian_rows(function, call.resid_pre[0, input_token], budget, live=64 * call.seq)
    if output_token == input_token:
        jacobian.diagonal().sub_(1)
    return jacobian
