"""Every Jacobian is compared with the model's own derivative before it is used."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.protocol import Call

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def probe(layer: int, like: Float[Tensor, "*shape d_model"]) -> Float[Tensor, " d_model"]:
    """The fixed random direction u that a layer's Jacobian is checked along, in the dtype and on the device of ``like``."""
    return _probe(layer, like.shape[-1], like.dtype, like.device)


@functools.lru_cache(maxsize=512)  # it is asked for several times a block and prompt, and comes from the host
def _probe(layer: int, d_model: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " d_model"]:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(d_model, generator=generator, dtype=torch.float64).to(device, dtype)


def certify(call: Call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int) -> float:
    """Relative error of uᵀJ against one backward pass through the whole block, for its fixed random u.

    J is what remains of ∂F when the identity is taken off. Where it is tiny beside that identity, its rounding is what it
    is compared with: a certificate below ``TOLERANCE`` then means an absolute error of at most four roundings of 1.

    Args:
        call: the block's call, inside its ``ready()`` context.
        jacobian: J of the block *without* its skip connection.
        output_token: absolute index.
        input_token: absolute index.

    Returns:
        ‖uᵀJ − ∂(u·f)/∂x‖ / max(‖∂(u·f)/∂x‖, 4 eps ‖u‖ / tolerance), NaN for a Jacobian that is not finite.
    """
    u = probe(call.layer, call.resid_pre)
    pulled = pulled_back(call, output_token, input_token)
    truth = pulled - u if output_token == input_token else pulled
    return _relative_errors(u, jacobian[None], truth[None]).item()


def certify_each(
    calls: Sequence[Call], jacobians: Float[Tensor, "prompt d_model d_model"], tokens: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """:func:`certify` of one block's J_tt for several prompts, each at its own token t. Nothing is read from the device."""
    u = probe(calls[0].layer, calls[0].resid_pre)
    return _relative_errors(u, jacobians, pulled_back_each(calls, tokens) - u)


def pulled_back(call: Call, output_token: int, input_token: int) -> Float[Tensor, " d_model"]:
    """uᵀ ∂F_{output} / ∂x_{input} of the call's probe u: taken on the way, by a step of decoding, or of the whole block."""
    if call.pullback is not None and call.pullback[0] == output_token:
        return call.pullback[1][input_token]
    u = probe(call.layer, call.resid_pre)
    if call.keys is not None and output_token == input_token:
        pulled = call.pulled_back_decoding([call], [u], [output_token])[0]
        if torch.isfinite(pulled).all():
            return pulled
    return call.pulled_back(u, output_token)[input_token]


def pulled_back_each(calls: Sequence[Call], tokens: Sequence[int]) -> Float[Tensor, "prompt d_model"]:
    """:func:`pulled_back` of several prompts, each from its own token to itself: at once where they kept keys.

    NaN where a step of decoding is not the block; alone, such a prompt is pulled back through its whole sequence.
    """
    if all(call.pullback is None and call.keys is not None for call in calls):
        directions = [probe(call.layer, call.resid_pre) for call in calls]
        try:
            return calls[0].pulled_back_decoding(calls, directions, tokens)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError):
            pass
    return torch.stack([pulled_back(call, token, token) for call, token in zip(calls, tokens, strict=True)])


def with_probe_pulled_back(call: Call, output_token: int) -> Call:
    """The call, which then certifies every Jacobian to ``output_token`` at no further cost. One pass through the block."""
    if call.pullback is not None and call.pullback[0] == output_token:
        return call
    with call.ready():
        return call.with_pullback(output_token, call.pulled_back(probe(call.layer, call.resid_pre), output_token))


STEPS = (1e-2, 1e-3, 1e-4)  # of a difference, in units of the vector that is moved


def require_true_gradients(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int
) -> None:
    """Move the input a little each way and see whether the output follows as J says.

    Autograd cannot tell of itself that a part of a block runs without gradients; the closed level can, whose rules do not
    ask it. For what the other levels give this costs two to six passes through the block.

    Raises:
        CouplingError: if the output moves in another way: by a twentieth or more, however small the step.
    """
    x = call.resid_pre[0, input_token]
    v = probe(call.layer, x)
    predicted = jacobian @ v
    for step in STEPS:
        h = step * x.norm() / v.norm()
        ends = []
        for sign in (1, -1):
            moved = call.resid_pre.clone()
            moved[0, input_token] += sign * h * v
            ends.append(call(moved)[0, output_token])
        difference = (ends[0] - ends[1]) / (2 * h)
        if output_token == input_token:
            difference = difference - v
        rounding = 8 * torch.finfo(call.dtype).eps * (ends[0].norm() / h + v.norm())
        allowed = 0.05 * torch.maximum(difference.norm(), predicted.norm()) + rounding
        if (difference - predicted).norm() <= allowed:
            return
    raise CouplingError(
        f"got a block {call.layer} whose output does not move as its gradients say, expected true ones; "
        "take torch.no_grad and detach out of the model's own code"
    )


def require_not_constant(call: Call, jacobian: Float[Tensor, "d_model d_model"], error: float, token: int) -> None:
    """Refuse a J_tt of exactly zero, with a perfect certificate, of a block that changes its token.

    Raises:
        CouplingError: naming the block.
    """
    if error == 0 and not jacobian.any() and not torch.equal(call(call.resid_pre)[0, token], call.resid_pre[0, token]):
        raise CouplingError(
            f"got a Jacobian of block {call.layer} that is exactly zero though the block changes its token, expected "
            "derivatives of it; take torch.no_grad and detach out of the model's own code"
        )


def _relative_errors(
    u: Float[Tensor, " d_model"], jacobians: Float[Tensor, "prompt d_model d_model"], truth: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, " prompt"]:
    rounding = 4 * torch.finfo(u.dtype).eps * u.norm() / TOLERANCE[u.dtype]
    return (u @ jacobians - truth).norm(dim=-1) / torch.maximum(truth.norm(dim=-1), rounding)
