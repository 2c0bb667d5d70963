"""Comparison of Jacobians with differences of a block's outputs.

Autograd does not see a part of a block that runs without gradients: under ``no_grad``, in NumPy, or
in a number taken by ``.item()``. Neither do the rules of the closed level see it. A difference of
outputs does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory
from lm_eval_coupling.jacobians.certify import has_finer, probe
from lm_eval_coupling.jacobians.protocol import Call

STEPS = (1e-3, 1e-4, 1e-2)  # relative to the norm of the vector that is moved
DIRECTIONS = 2  # of a block whose derivatives have not been compared yet
SMOOTH = 1e-3  # largest relative difference between J v and a difference of outputs
ROUGH = 5e-2  # the same where differences at several steps disagree, as where a block rounds
_ANOTHER = 10**6  # added to a layer's number, for a direction other than its probe


def require_true_gradients(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int
) -> None:
    """Compare J v with differences of outputs along one direction v, or two for a new block.

    They are taken in float64 where the device has it. Costs two or four passes through the block,
    and up to three times as many where the first step does not agree. Passes are steps of decoding
    where the call kept its keys.

    Raises:
        CouplingError: if the block does not move as its gradients say.
    """
    # Errors of J below this are not certified where the tokens differ: it may be next to nothing.
    floor = 0.0 if output_token == input_token else 4 * torch.finfo(call.dtype).eps
    tokens = output_token, input_token
    count = 1 if call.is_verified else DIRECTIONS
    try:
        fine = call.in_dtype(torch.float64) if has_finer(call) else call
        is_true = _moves_as(fine, jacobian, tokens, floor, count)
    except RuntimeError as error:
        # A hook or a patched forward may hold tensors of its own, which stay in float32.
        pass_on_lack_of_memory(error)
        is_true = _moves_as(call, jacobian, tokens, floor, count)
    if not is_true:
        raise CouplingError(
            f"got a block {call.layer} whose output does not move as its gradients say, expected "
            "true ones; take torch.no_grad, detach, NumPy and .item() out of the model's own code "
            "and hooks"
        )
    call.mark_verified()


def _moves_as(
    call: Call,
    jacobian: Float[Tensor, "d_model d_model"],
    tokens: tuple[int, int],
    floor: float,
    count: int,
) -> bool:
    """Return whether J agrees with differences of outputs along each of ``count`` directions."""
    jacobian = jacobian.to(call.dtype)
    with call.ready():
        by_decoding = tokens[0] == tokens[1] and _decodes_as_traced(call, tokens[0])
        for number in range(count):
            v = probe(call.layer + number * _ANOTHER, call.resid_pre)
            if not _agrees(call, jacobian @ v, v, tokens, floor, by_decoding):
                return False
    return True


def _decodes_as_traced(call: Call, token: int) -> bool:
    """Return whether a step of decoding gives the traced output: then it can replace a pass."""
    if call.keys is None:
        return False
    try:
        u = probe(call.layer, call.resid_pre)
        return bool(call.batch_with([]).pull_back_decoding([u], [token]).isfinite().all())
    except (ValueError, RuntimeError) as error:
        pass_on_lack_of_memory(error)
        return False


def _agrees(
    call: Call,
    predicted: Float[Tensor, " d_model"],
    v: Float[Tensor, " d_model"],
    tokens: tuple[int, int],
    floor: float,
    by_decoding: bool,
) -> bool:
    output_token, input_token = tokens
    differences: list[Tensor] = []
    is_near = False
    for step in STEPS:
        h = step * float(call.resid_pre[0, input_token].norm() / v.norm())
        ends = [_output(call, sign * h * v, tokens, by_decoding) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / (2 * h)
        if output_token == input_token:
            difference = difference - v
        roundings = 8 * (ends[0].norm() / h + v.norm())
        size = torch.maximum(difference.norm(), predicted.norm())
        error = (difference - predicted).norm() - floor * v.norm()
        # Not `<=`: a difference that is no number is reported with its prompt, as not finite.
        if not error > SMOOTH * size + torch.finfo(call.dtype).eps * roundings:
            return True
        # Some blocks round to float32 inside, whatever the arithmetic of the call.
        rough = torch.maximum(ROUGH * size, torch.finfo(torch.float32).eps * roundings)
        is_near = is_near or bool(error <= rough)
        differences.append(difference)
    stacked = torch.stack(differences)
    spread = (stacked - stacked.mean(dim=0)).norm(dim=1).max() / stacked.norm(dim=1).max()
    return is_near and bool(spread > SMOOTH)


def _output(
    call: Call, move: Float[Tensor, " d_model"], tokens: tuple[int, int], by_decoding: bool
) -> Float[Tensor, " d_model"]:
    """Return F at the output token once ``move`` has been added to the input token."""
    output_token, input_token = tokens
    if by_decoding:
        x = call.resid_pre[:, [input_token]] + move
        return call.batch_with([]).decode(x, [input_token])[0, 0]
    moved = call.resid_pre.clone()
    moved[0, input_token] += move
    return call(moved)[0, output_token]


def require_not_constant(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], error: float, token: int
) -> None:
    """Refuse a J_tt of exactly zero, certified with an error of 0, if the block changes its token.

    Raises:
        CouplingError: naming the block.
    """
    if error != 0 or jacobian.any():
        return
    if not torch.equal(call(call.resid_pre)[0, token], call.resid_pre[0, token]):
        raise CouplingError(
            f"got a Jacobian of block {call.layer} that is exactly zero though the block changes "
            "its token, expected its derivatives; take torch.no_grad and detach out of the model's "
            "own code"
        )
