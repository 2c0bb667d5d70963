"""Level ``closed``: the real block on one token, differentiated step by step into matrix products.

Like ``token-local``, but each step hands on a structured tangent (tangent.py) instead of d_model directions: norms stay
diagonal plus low rank, the derivative of a projection is its weight as it stands, an activation only scales rows, and what
is left to multiply is W_out·(rows of the MLP's inner weights), the output projection, and the product of the two halves of
the block. Rules go by kind of operation and know no model family; a step without a rule raises, and the block is done by
the next level.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.jacobians.attention_core import AttentionRecord, LinearCore
from lm_eval_coupling.jacobians.rules import Differentiation, NoRule
from lm_eval_coupling.jacobians.tangent import Dense, NearIdentity, Origin, Tangent, common_origin, lifted


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
    return _jacobian(call, x, output_token, root, NearIdentity.identity(root, x), partial(_through, core))


def output_factor(call, record: AttentionRecord, output_token: int) -> Float[Tensor, "d_model head_value"]:
    """M = ∂F_{output}/∂z, z being what the attention core hands on at the output token: shared by all input tokens."""
    z = record.z
    root = Origin(1, z.numel())
    x = call.resid_pre[0, output_token]

    def start(run, q, k_t, v):
        value = z.reshape(*q.shape[:-1], z.shape[-1])
        return value, NearIdentity.identity(root, value)

    return _jacobian(call, x, output_token, root, None, start)


def input_factor(call, core: LinearCore) -> Float[Tensor, "head_value d_model"]:
    """C = ∂z_{output}/∂x_{input}, for an input token before the output token."""
    x = call.resid_pre[0, core.input_token]
    root = Origin(1, x.numel())
    reached = []

    def stop(*parts):
        z, tangent = _through(core, *parts)
        reached.append(lifted(tangent, z.shape, root).rows(z.shape)[0])
        raise _Reached

    try:
        _jacobian(call, x, core.input_token, root, NearIdentity.identity(root, x), stop)
    except _Reached:
        return reached[0]
    raise NoRule("the block ended before its attention core was reached")


def _jacobian(call, x: Tensor, token: int, root: Origin, tangent: Tangent | None, core) -> Float[Tensor, "d_out width"]:
    """∂F/∂(root) of a one-token run at ``x``, whose own tangent is ``tangent``; ``core`` answers for the attention core."""
    run = Differentiation(core)
    run.set(x, tangent)
    with run:
        out = call.one_token(x, token)
    if run.stage != "done":
        raise NoRule(f"the run on one token stopped while looking for the {run.stage} of the attention core")
    if run.of(out) is None:
        raise NoRule("the output lost its derivative on the way")
    return lifted(run.of(out), out.shape, root).rows(out.shape)[0]


def _through(core: LinearCore, run: Differentiation, q: Tensor, k_t: Tensor, v: Tensor) -> tuple[Tensor, Dense]:
    """The core's output at one token, and its tangent from those of q, k and v (attention_core.py has the formulas)."""
    tangents = [run.of(value) for value in (q, k_t, v)]
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
    shape = (*batch, 1, record.z.shape[-1])
    return record.z.reshape(shape), Dense(origin, dz.reshape(*shape, origin.width))
