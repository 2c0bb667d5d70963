"""Level ``closed``: the real block on one token, differentiated step by step into matrix products.

Like ``token-local``, but each step hands on a structured tangent (tangent.py) instead of d_model directions: norms stay
diagonal plus low rank, the derivative of a projection is its weight as it stands, an activation only scales rows, and what
is left to multiply is W_out·(rows of the MLP's inner weights), the output projection, and the product of the two halves of
the block. Rules go by kind of operation and know no model family; a step without a rule raises, and the block is done by
the next level.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.attention_core import AttentionRecord, LinearCore
from lm_eval_coupling.jacobians.rules import NoRule
from lm_eval_coupling.jacobians.tangent import Dense, NearIdentity, Origin, common_origin, lifted
from lm_eval_coupling.jacobians.tape import Tape


class _Reached(Exception):
    """The attention core was reached; nothing after it is needed."""


def closed_jacobian(call, output_token: int, input_token: int, budget: int) -> Float[Tensor, "d_model d_model"]:
    """∂F_{output}/∂x_{input} of one block (skip connection included).

    Arguments and result as in ``token_local_jacobian``; ``budget`` is not needed: working memory is a few d_ff·d_model.

    Raises:
        NoAttentionCore: if the block holds no softmax attention.
        NoRule: if a step of the block has no rule.
    """
    del budget
    record = AttentionRecord.of(call, output_token)
    core = LinearCore.at(record, output_token, input_token)
    if not core.same_token:
        return output_factor(call, record, output_token) @ input_factor(call, core)
    x = call.resid_pre[0, output_token]
    root = Origin(1, x.numel())
    tape = Tape(partial(_through, core))
    tape.watch(x, NearIdentity.identity(root, x))
    return _derivative(tape, _run(tape, call, x, output_token), root)


def output_factor(call, record: AttentionRecord, output_token: int) -> Float[Tensor, "d_model head_value"]:
    """M = ∂F_{output}/∂z, z being what the attention core hands on at the output token: shared by all input tokens."""
    root = Origin(1, record.z.numel())

    def start(tape, q, k_t, v):
        z = record.z.reshape(*q.shape[:-1], record.z.shape[-1])
        return tape.watch(z, NearIdentity.identity(root, z))

    tape = Tape(start)
    return _derivative(tape, _run(tape, call, call.resid_pre[0, output_token], output_token), root)


def input_factor(call, core: LinearCore) -> Float[Tensor, "head_value d_model"]:
    """C = ∂z_{output}/∂x_{input}, for an input token before the output token."""
    x = call.resid_pre[0, core.input_token]
    root = Origin(1, x.numel())
    reached = []

    def stop(*parts):
        reached.append(_through(core, *parts))
        raise _Reached

    tape = Tape(stop)
    tape.watch(x, NearIdentity.identity(root, x))
    with contextlib.suppress(_Reached):
        _run(tape, call, x, core.input_token)
    return _derivative(tape, reached[0], root)


def _run(tape: Tape, call, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
    """The block's output for one token, kept on ``tape``."""
    with tape:
        out = call.one_token(x, token)
    if tape.stage != "done":
        raise NoRule(f"the run on one token stopped while looking for the {tape.stage} of the attention core")
    return out


def _derivative(tape: Tape, outcome: Tensor, root: Origin) -> Float[Tensor, "d_out width"]:
    return lifted(tape.differentiate(outcome), outcome.shape, root).rows(outcome.shape)[0]


def _through(core: LinearCore, tape: Tape, q: Tensor, k_t: Tensor, v: Tensor) -> Tensor:
    """The core's output at one token. Its tangent comes from those of q, k and v (attention_core.py has the formulas)."""
    z = core.record.z.reshape(*q.shape[:-2], 1, core.record.z.shape[-1])
    return tape.note(_through, partial(_core_tangent, core), (q, k_t, v), {}, z)


def _core_tangent(core: LinearCore, tape: Tape, func, z: Tensor, q: Tensor, k_t: Tensor, v: Tensor) -> Dense:
    tangents = [tape.of(value) for value in (q, k_t, v)]
    if any(tangent is None for tangent in tangents):
        raise NoRule("a query, key or value does not depend on its token")
    origin = common_origin(tangents)
    batch = q.shape[:-2]

    def per_head(tangent, value):
        rows = lifted(tangent, value.shape, origin).values().expand(*value.shape, origin.width)
        return rows.expand(*batch, *rows.shape[-3:]).reshape(batch.numel(), -1, origin.width)

    dq, dk, dv = (per_head(t, value) for t, value in zip(tangents, (q, k_t, v), strict=True))
    record = core.record
    dz = record.weights[:, core.input_token, None, None] * dv
    dz = torch.baddbmm(dz, core.dz_dqk[..., None], record.q[:, None] @ dk)
    if core.same_token:
        dz = torch.baddbmm(dz, core.dz_dq, dq)
    return Dense(origin, dz.reshape(*z.shape, origin.width))
