"""Level ``token-local``: the block on one token, with the attention core in closed form.

With the other tokens fixed, x_t reaches a block's output in two ways only: through the q_t, k_t and
v_t that enter the attention core, and through steps that act on each token alone. So the block is
run on *one* token, its attention core is replaced by a linearization that is exact to first order
(:mod:`.attention_core`), and this function of one token is differentiated. Costs about d_model
one-token passes, whatever the length of the sequence. Works for any softmax attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.attention_core import AttentionRecord, LinearCore
from lm_eval_coupling.jacobians.differentiate import jacobian_columns
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.jacobians.watch import Substitute


class _Reached(Exception):
    """Ends a run at the attention core; nothing after it is needed."""


def token_local_jacobian(
    call: Call, output_token: int, input_token: int, budget: int
) -> Float[Tensor, "d_model d_model"]:
    """Return ∂f_{output}/∂x_{input} of one block, skip connection excluded.

    Args:
        call: the block's call, inside its ``ready()`` context.
        output_token: absolute index of the token whose output is differentiated.
        input_token: absolute index of the token it is differentiated by.
        budget: bytes that the directions differentiated at once may take.

    Returns:
        Row = output coordinate, column = input coordinate, in the call's dtype.

    Raises:
        NoAttentionCore: if the block holds no softmax attention.
    """
    record = AttentionRecord.of(call, output_token)
    core = LinearCore.at(record, output_token, input_token)
    if core.same_token:
        function = _same_token(call, core, output_token)
    else:
        function = _other_token(call, core, output_token, input_token)
    jacobian = jacobian_columns(function, call.resid_pre[0, input_token], budget)
    if core.same_token:
        jacobian.diagonal().sub_(1)
    return jacobian


def _same_token(call: Call, core: LinearCore, token: int) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        with Substitute(core):
            return call.one_token(x, token)

    return function


def _other_token(
    call: Call, core: LinearCore, output_token: int, input_token: int
) -> Callable[[Tensor], Tensor]:
    """Return the output at t2 as a function of x_{t1}, which moves it through its key and value."""
    at_output = call.resid_pre[0, output_token]

    def function(x: Tensor) -> Tensor:
        reached = []

        def stop(q: Tensor, k: Tensor, v: Tensor) -> None:
            reached.append(core(q, k, v))
            raise _Reached

        with contextlib.suppress(_Reached), Substitute(stop):
            call.one_token(x, input_token)
        with Substitute(lambda q, k, v: reached[0]):
            return call.one_token(at_output, output_token)

    return function
