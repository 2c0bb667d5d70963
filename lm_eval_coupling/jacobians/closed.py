"""Level ``closed``: the block on one token, differentiated step by step into matrix products.

It differs from ``token-local`` in two ways: any number of prompts go through at once, and each step
hands on a structured tangent (:mod:`.tangent`) instead of d_model directions. Norms stay diagonal
plus low rank, the derivative of a projection is its weight, and an activation only scales rows.
Left to multiply are W_out · (rows of the MLP's inner weights), the output projection, and the
product of the two halves of the block. A step without a rule raises, and the next level does the
block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.attention_core import AttentionRecord, LinearCore
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.jacobians.rules import NoRule
from lm_eval_coupling.jacobians.tangent import (
    Dense,
    NearIdentity,
    Origin,
    Tangent,
    common_origin,
    dense,
    lifted,
)
from lm_eval_coupling.jacobians.tape import Tape


class _Reached(Exception):
    """Ends a run at the attention core; nothing after it is needed."""


def closed_jacobian(
    call: Call, output_token: int, input_token: int, budget: int
) -> Float[Tensor, "d_model d_model"]:
    """Return ∂f_{output}/∂x_{input} of one block, skip connection excluded.

    Arguments are those of ``token_local_jacobian``. ``budget`` is not needed: working memory is a
    few d_ff·d_model.

    Returns:
        Row = output coordinate, column = input coordinate, in the call's dtype.

    Raises:
        NoAttentionCore: if the block holds no softmax attention.
        NoRule: if a step of the block has no rule.
    """
    del budget
    if output_token == input_token:
        return closed_jacobians([call], [output_token])[0]
    return closed_row(call, output_token, [input_token])[0]


def closed_row(
    call: Call, output_token: int, input_tokens: Sequence[int]
) -> Float[Tensor, "token d_model d_model"]:
    """Return ∂F_{output}/∂x_{input} of one block for several input tokens other than the output's.

    They share the part of the block after the attention core: J = M C with M = ∂F/∂z at the output.

    Returns:
        One matrix per input token, in the call's dtype.
    """
    record = AttentionRecord.of(call, output_token)
    return output_factor(call, record, output_token) @ input_factors(
        call, record, output_token, input_tokens
    )


def closed_jacobians(
    calls: Sequence[Call], tokens: Sequence[int]
) -> Float[Tensor, "prompt d_model d_model"]:
    """Return ∂f_t/∂x_t of one block for several prompts, each at its own token t.

    The skip connection is left out where it is added, not subtracted from ∂F at the end, so that a
    small ∂f keeps its digits. Steps are gone through once for all prompts. One prompt's call may
    occur several times.

    Returns:
        One matrix per call, in the calls' dtype.

    Raises:
        NoAttentionCore: if the block holds no softmax attention.
        NoRule: if a step of the block has no rule.
        ValueError: if the arguments of the calls cannot be joined.
    """
    core = LinearCore.of_each(calls, tokens)
    x = torch.stack([call.resid_pre[0, token] for call, token in zip(calls, tokens, strict=True)])
    root = Origin(*x.shape)
    tape = Tape(partial(_through, core))
    tape.watch(x, NearIdentity.identity(root, x))
    return _derivative(tape, _run(tape, calls, x, tokens), root, less=1.0)


def output_factor(
    call: Call, record: AttentionRecord, output_token: int
) -> Float[Tensor, "d_model head_value"]:
    """Return M = ∂F_{output}/∂z, z being the output of the attention core at the output token."""
    root = Origin(1, record.z.numel())

    def start(tape: Tape, q: Tensor, k_t: Tensor, v: Tensor) -> Tensor:
        z = record.z.reshape(*q.shape[:-1], record.z.shape[-1])
        return tape.watch(z, NearIdentity.identity(root, z))

    tape = Tape(start)
    output = _run(tape, [call], call.resid_pre[:, output_token], [output_token])
    return _derivative(tape, output, root)[0]


def input_factors(
    call: Call, record: AttentionRecord, output_token: int, input_tokens: Sequence[int]
) -> Float[Tensor, "token head_value d_model"]:
    """Return C = ∂z_{output}/∂x_{input} for each input token other than the output token."""
    core = LinearCore.joined([LinearCore.at(record, output_token, token) for token in input_tokens])
    x = call.resid_pre[0, list(input_tokens)]
    root = Origin(*x.shape)
    reached = []

    def stop(*parts: Any) -> None:
        reached.append(_through(core, *parts))
        raise _Reached

    tape = Tape(stop)
    tape.watch(x, NearIdentity.identity(root, x))
    with contextlib.suppress(_Reached):
        _run(tape, [call] * len(input_tokens), x, input_tokens)
    return _derivative(tape, reached[0], root)


def _run(
    tape: Tape, calls: Sequence[Call], x: Float[Tensor, "prompt d_model"], tokens: Sequence[int]
) -> Float[Tensor, "prompt d_model"]:
    """Run the block on one token of each prompt, with its steps kept on ``tape``."""
    with tape:
        out = calls[0].batch_with(calls[1:]).one_token(x, tokens)
    if tape.stage != "done":
        raise NoRule(
            f"the run on one token stopped while looking for the {tape.stage} of the attention core"
        )
    return out


def _derivative(
    tape: Tape, outcome: Tensor, root: Origin, less: float = 0.0
) -> Float[Tensor, "prompt d_out width"]:
    """Multiply out the derivative of ``outcome`` and subtract ``less`` times the identity."""
    tangent = lifted(tape.differentiate(outcome), outcome.shape, root)
    if isinstance(tangent, NearIdentity):
        return tangent.matrix(less)
    rows = tangent.rows(outcome.shape)
    if less:
        rows = rows.clone()
        rows.diagonal(dim1=1, dim2=2).sub_(less)
    return rows


def _through(core: LinearCore, tape: Tape, q: Tensor, k_t: Tensor, v: Tensor) -> Tensor:
    """Put the attention core on the tape as one step; :mod:`.attention_core` has its derivative."""
    z = core.z.reshape(*q.shape[:-2], 1, core.z.shape[-1])
    return tape.note(_through, partial(_core_tangent, core), (q, k_t, v), {}, z)


def _core_tangent(
    core: LinearCore, tape: Tape, func: Any, z: Tensor, q: Tensor, k_t: Tensor, v: Tensor
) -> Dense:
    tangents = [tangent for value in (q, k_t, v) if (tangent := tape.of(value)) is not None]
    if len(tangents) < 3:
        raise NoRule("a query, key or value does not depend on its token")
    origin = common_origin(tangents)
    batch = q.shape[:-2]

    def per_head(tangent: Tangent, value: Tensor) -> Tensor:
        rows = dense(lifted(tangent, value.shape, origin), value.shape).values()
        rows = rows.expand(*value.shape, origin.width)
        return rows.expand(*batch, *rows.shape[-3:]).reshape(batch.numel(), -1, origin.width)

    dq, dk, dv = (per_head(t, value) for t, value in zip(tangents, (q, k_t, v), strict=True))
    dz = core.weight[:, None, None] * dv
    dz = torch.baddbmm(dz, core.dz_dqk[..., None], core.query[:, None] @ dk)
    if core.dz_dq is not None:
        dz = torch.baddbmm(dz, core.dz_dq, dq)
    return Dense(origin, dz.reshape(*z.shape, origin.width))
