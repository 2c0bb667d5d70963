"""One certified Jacobian: levels are tried in turn, the fastest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.attention_core import NoAttentionCore
from lm_eval_coupling.jacobians.autodiff import autodiff_jacobian
from lm_eval_coupling.jacobians.certify import (
    TOLERANCE,
    Truth,
    certify_each,
)
from lm_eval_coupling.jacobians.closed import closed_jacobian, closed_jacobians
from lm_eval_coupling.jacobians.differences import require_not_constant, require_true_gradients
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.jacobians.rules import NoRule
from lm_eval_coupling.jacobians.token_local import token_local_jacobian

LEVELS = {
    "closed": closed_jacobian,
    "token-local": token_local_jacobian,
    "autodiff": autodiff_jacobian,
}
BUDGET = 1 << 30  # bytes that the directions differentiated at once may take
# Fraction of the tolerance below which float32 kept enough digits of a small J: a level that
# subtracts the identity at the end would be off by more.
_DIGITS_KEPT = 0.1
_IN_FLOAT64 = "small beside the identity: in float64"
_NO_FLOAT64 = (
    "small beside the identity: the device has no float64, so that digits of it may be lost"
)


@dataclasses.dataclass(frozen=True)
class Certified:
    """Jacobian of a block with its certificate.

    Attributes:
        jacobian: J without the skip connection.
        error: relative error against the block's own derivative.
        level: the level that computed it.
        why: in words, why no faster level did; None if the fastest did.
    """

    jacobian: Float[Tensor, "d_model d_model"]
    error: float
    level: str
    why: str | None = None


class NotTogether(Exception):
    """The closed level gives no Jacobians of several prompts together.

    ``why`` is set where it gives none of a single prompt either.
    """

    def __init__(self, why: str | None = None) -> None:
        super().__init__(why)
        self.why = why


def closed_together(
    calls: Sequence[Call], pairs: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "prompt d_model d_model"], Float[Tensor, " prompt"]]:
    """Compute J_tt of one block for several prompts by the closed level.

    Returns:
        The Jacobians and their certificates.

    Raises:
        NotTogether: if a pair has two tokens, or the level fails for these calls.
        RuntimeError: by the device, if memory runs out.
    """
    if any(output_token != input_token for output_token, input_token in pairs):
        raise NotTogether
    tokens = [token for token, _ in pairs]
    with calls[0].ready():
        try:
            jacobians = closed_jacobians(calls, tokens)
            return jacobians, certify_each(calls, jacobians, tokens)
        except Exception as error:
            # Each prompt is done alone then, and finds the level that can or says what is wrong.
            pass_on_lack_of_memory(error)
            holds_alone = isinstance(error, (NoRule, NoAttentionCore))
            raise NotTogether(_describe("closed", error) if holds_alone else None) from None


def passes(certificates: Float[Tensor, "*shape"], dtype: torch.dtype) -> Bool[Tensor, "*shape"]:
    """Return which certificates are within the tolerance of ``dtype``.

    Exactly 0 does not pass: J and the derivative may both be zero because neither was taken. Such a
    Jacobian is looked at again alone.
    """
    return (certificates > 0) & (certificates <= TOLERANCE[dtype])


def certified_jacobians(
    calls: Sequence[Call], tokens: Sequence[int], method: str
) -> list[Certified]:
    """Return :func:`certified_jacobian` of J_tt for several prompts of one block.

    They are computed together where the closed level is certified, else alone.
    """
    why = None
    if method in ("auto", "closed"):
        try:
            jacobians, errors = closed_together(calls, [(token, token) for token in tokens])
        except NotTogether as failure:
            why = failure.why
        else:
            good, values = passes(errors, calls[0].dtype).tolist(), errors.tolist()
            verify_each(calls, jacobians, good, [(token, token) for token in tokens])
            return [
                Certified(jacobians[i], values[i], "closed")
                if good[i]
                else certified_jacobian(call, token, token, method)
                for i, (call, token) in enumerate(zip(calls, tokens, strict=True))
            ]
    at = zip(calls, tokens, strict=True)
    return [certified_jacobian(call, token, token, method, why) for call, token in at]


def verify_each(
    calls: Sequence[Call],
    jacobians: Float[Tensor, "prompt d_model d_model"],
    good: Sequence[bool],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Compare ``good`` Jacobians with differences of outputs, until their block is verified.

    Raises:
        CouplingError: if the block does not move as its gradients say.
    """
    for i, call in enumerate(calls):
        if good[i] and not call.is_verified:
            with call.ready():
                require_true_gradients(call, jacobians[i], *pairs[i])


def certified_jacobian(
    call: Call, output_token: int, input_token: int, method: str, closed_fails: str | None = None
) -> Certified:
    """Compute J of one block at the first level that is certified.

    Args:
        call: the block's call.
        output_token: absolute index.
        input_token: absolute index.
        method: ``auto``, or the one level to use.
        closed_fails: why the closed level need not be tried, if that is known.

    Returns:
        J; of the last level even if its error is beyond the tolerance.

    Raises:
        RuntimeError: by the device, if memory runs out, at any level.
        CouplingError: if the block does not move as its gradients say.
        Exception: the failure of the last level.
    """
    levels = list(LEVELS) if method == "auto" else [method]
    why = []
    if closed_fails and method == "auto":
        levels = [level for level in levels if level != "closed"]
        why.append(closed_fails)
    if input_token > output_token:
        # An attention core is recorded from the keys up to the output token alone.
        call = call.without_keys()
    tokens = output_token, input_token
    with call.ready():
        truth = Truth.of(call, *tokens)
        for level in levels:
            try:
                jacobian, error, remark = _at_level(level, call, truth, tokens)
            except Exception as failure:
                pass_on_lack_of_memory(failure)
                if level == levels[-1]:
                    raise
                why.append(_describe(level, failure))
                continue
            if error <= TOLERANCE[call.dtype] or level == levels[-1]:
                break
            why.append(f"{level}: off by {error:.1e}")
        if error <= TOLERANCE[call.dtype]:
            _require_derivative(call, jacobian, error, tokens, level)
    why += [remark] if remark else []
    return Certified(jacobian.to(call.dtype), error, level, "; ".join(why) or None)


def _at_level(
    level: str, call: Call, truth: Truth, tokens: tuple[int, int]
) -> tuple[Tensor, float, str]:
    """Compute J at one level, in float64 where the identity beside it left too few digits.

    Returns:
        J, its error, and a remark about its digits, which may be empty.
    """
    jacobian = LEVELS[level](call, *tokens, BUDGET)
    error = truth.error(jacobian)
    # Not `>`: an error that is no number must be computed again as well.
    if truth.finer is not None and not error <= _DIGITS_KEPT * TOLERANCE[call.dtype]:
        with truth.finer.ready():
            jacobian = LEVELS[level](truth.finer, *tokens, BUDGET)
        return jacobian, truth.error(jacobian.to(call.dtype)), _IN_FLOAT64
    subtracts_identity = level != "closed" and tokens[0] == tokens[1]
    is_lost = truth.finer is None and truth.is_small and call.dtype == torch.float32
    return jacobian, error, _NO_FLOAT64 if subtracts_identity and is_lost else ""


def _describe(level: str, error: Exception) -> str:
    return f"{level}: " + (" ".join(str(error).split())[:120] or type(error).__name__)


def _require_derivative(
    call: Call, jacobian: Tensor, error: float, tokens: tuple[int, int], level: str
) -> None:
    """Refuse a J that agrees with autograd where autograd itself is wrong.

    Outputs are compared once per block. Levels that rest on autograd are compared each time.
    """
    output_token, input_token = tokens
    if output_token == input_token:
        require_not_constant(call, jacobian, error, output_token)
    if input_token <= output_token and (level != "closed" or not call.is_verified):
        require_true_gradients(call, jacobian, output_token, input_token)
