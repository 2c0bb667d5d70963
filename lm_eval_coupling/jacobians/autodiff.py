"""Level ``autodiff``: reverse mode through the whole sequence.

Works for any model, is slow, and is what the other levels are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.differentiate import jacobian_row_parts, jacobian_rows
from lm_eval_coupling.jacobians.protocol import Call


def autodiff_jacobian(
    call: Call, output_token: int, input_token: int, budget: int
) -> Float[Tensor, "d_model d_model"]:
    """Return ∂f_{output}/∂x_{input} of one block by one backward pass per output coordinate.

    The skip connection is left out. Arguments are those of ``token_local_jacobian``. Memory and
    time grow with the sequence, although the result does not.

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


def autodiff_row(
    call: Call, output_token: int, input_tokens: Sequence[int], budget: int
) -> Float[Tensor, "token d_model d_model"]:
    """Return ∂F_{output}/∂x_{input} of one block for several input tokens other than the output's.

    A backward pass reaches all tokens, so many cost about as much as one.

    Returns:
        One matrix per input token, in the call's dtype.
    """

    def function(x: Tensor) -> Tensor:
        return call(x.view_as(call.resid_pre))[0, output_token]

    d_model, tokens, start = call.resid_pre.shape[-1], list(input_tokens), 0
    jacobians = call.resid_pre.new_empty(len(tokens), d_model, d_model)
    for rows in jacobian_row_parts(function, call.resid_pre.reshape(-1), budget, live=64):
        by_token = rows.view(len(rows), call.seq, d_model)
        jacobians[:, start : start + len(rows)] = by_token[:, tokens].transpose(0, 1)
        start += len(rows)
    return jacobians
