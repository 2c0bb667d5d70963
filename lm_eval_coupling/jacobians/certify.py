"""Every Jacobian is compared with the model's own derivative before it is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory
from lm_eval_coupling.jacobians.methods import BYTES
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.numerics.devices import has_float64

DTYPES = {name: getattr(torch, name) for name in BYTES}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def probe(layer: int, like: Float[Tensor, "*shape d_model"]) -> Float[Tensor, " d_model"]:
    """The fixed random direction u that a layer's Jacobian is checked along, in the dtype and on the device of ``like``."""
    return _probe(layer, like.shape[-1], like.dtype, like.device)


@functools.lru_cache(
    maxsize=512
)  # it is asked for several times a block and prompt, and comes from the host
def _probe(
    layer: int, d_model: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " d_model"]:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(d_model, generator=generator, dtype=torch.float64).to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Truth:
    """∂(u·f)/∂x of one block by backpropagation, u being its fixed random direction: what uᵀJ is compared with.

    ``lost`` is the least size, relative to ‖u‖, that an error is compared with: of anything smaller the identity's rounding
    says nothing. ``finer`` is the call in float64, where J is so small that float32 would leave it too few digits.
    """

    u: Float[Tensor, " d_model"]
    derivative: Float[Tensor, " d_model"]
    lost: float
    finer: Call | None = None

    @classmethod
    def of(cls, call: Call, output_token: int, input_token: int) -> Truth:
        """One backward pass through the block, and where J_tt is small beside the identity another one in float64.

        Args:
            call: the block's call, inside its ``ready()`` context.
            output_token: absolute index.
            input_token: absolute index.

        Returns:
            The derivative in the call's dtype, or in float64 with the call that it is of.
        """
        u, lost = probe(call.layer, call.resid_pre), _lost(call.dtype, call.dtype)
        pulled = pulled_back(call, output_token, input_token)
        if output_token != input_token:
            return cls(u, pulled, lost)
        if (pulled - u).norm() >= lost * u.norm() or not has_finer(call):
            return cls(u, pulled - u, lost)
        finer = call.in_dtype(torch.float64)
        u = probe(finer.layer, finer.resid_pre)
        with finer.ready():
            return cls(
                u,
                pulled_back(finer, output_token, input_token) - u,
                _lost(torch.float64, call.dtype),
                finer,
            )

    @property
    def is_small(self) -> bool:
        """Whether J is so small beside the identity that float32 has too few digits for their sum."""
        return bool(self.derivative.norm() < _lost(torch.float32, torch.float32) * self.u.norm())

    def error(self, jacobian: Float[Tensor, "d_model d_model"]) -> float:
        """‖uᵀJ − ∂(u·f)/∂x‖ / max(‖∂(u·f)/∂x‖, lost ‖u‖), NaN for a Jacobian that is not finite."""
        return _relative_errors(
            self.u, jacobian[None].to(self.u.dtype), self.derivative[None], self.lost
        ).item()


def _lost(arithmetic: torch.dtype, dtype: torch.dtype) -> float:
    """‖J‖ relative to the identity's from which on four roundings of their sum are within the tolerance of ``dtype``."""
    return 4 * torch.finfo(arithmetic).eps / TOLERANCE[dtype]


def has_finer(call: Call) -> bool:
    """Whether the call can be made again in an arithmetic of more digits."""
    return call.dtype == torch.float32 and has_float64(call.resid_pre.device)


def certify(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int
) -> float:
    """Relative error of uᵀJ against one backward pass through the whole block, for its fixed random u; see :class:`Truth`.

    Args:
        call: the block's call, inside its ``ready()`` context.
        jacobian: J of the block *without* its skip connection.
        output_token: absolute index.
        input_token: absolute index.

    Returns:
        As :meth:`Truth.error` has it.
    """
    return Truth.of(call, output_token, input_token).error(jacobian)


def certify_each(
    calls: Sequence[Call], jacobians: Float[Tensor, "prompt d_model d_model"], tokens: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """:func:`certify` of one block's J_tt for several prompts, each at its own token t. Nothing is read from the device.

    Returns:
        NaN where J is so small that only a finer arithmetic can tell.
    """
    u, lost = probe(calls[0].layer, calls[0].resid_pre), _lost(calls[0].dtype, calls[0].dtype)
    truth = pulled_back_each(calls, tokens) - u
    errors = _relative_errors(u, jacobians, truth, lost)
    return (
        torch.where(truth.norm(dim=-1) < lost * u.norm(), torch.nan, errors)
        if has_finer(calls[0])
        else errors
    )


def pulled_back(call: Call, output_token: int, input_token: int) -> Float[Tensor, " d_model"]:
    """uᵀ ∂F_{output} / ∂x_{input} of the call's probe u: taken on the way, by a step of decoding, or of the whole block."""
    if call.pullback is not None and call.pullback[0] == output_token:
        return call.pullback[1][input_token]
    u = probe(call.layer, call.resid_pre)
    if call.keys is not None and output_token == input_token:
        pulled = call.batch_with([]).pull_back_decoding([u], [output_token])[0]
        if torch.isfinite(pulled).all():
            return pulled
    return call.pulled_back(u, output_token)[input_token]


def pulled_back_each(
    calls: Sequence[Call], tokens: Sequence[int]
) -> Float[Tensor, "prompt d_model"]:
    """:func:`pulled_back` of several prompts, each from its own token to itself: at once where they kept keys.

    Returns:
        NaN where a step of decoding is not the block; alone, such a prompt is pulled back through its whole sequence.

    Raises:
        RuntimeError: as the device has it, if the prompts take more memory together than there is.
    """
    if all(call.pullback is None and call.keys is not None for call in calls):
        directions = [probe(call.layer, call.resid_pre) for call in calls]
        try:
            return calls[0].batch_with(calls[1:]).pull_back_decoding(directions, tokens)
        except (ValueError, RuntimeError) as error:
            pass_on_lack_of_memory(error)
    return torch.stack(
        [pulled_back(call, token, token) for call, token in zip(calls, tokens, strict=True)]
    )


def with_probe_pulled_back(call: Call, output_token: int) -> Call:
    """The call, which then certifies every Jacobian to ``output_token`` at no further cost. One pass through the block."""
    if call.pullback is not None and call.pullback[0] == output_token:
        return call
    with call.ready():
        return call.with_pullback(
            output_token, call.pulled_back(probe(call.layer, call.resid_pre), output_token)
        )


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


def require_not_constant(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], error: float, token: int
) -> None:
    """Refuse a J_tt of exactly zero, with a perfect certificate, of a block that changes its token.

    Raises:
        CouplingError: naming the block.
    """
    if (
        error == 0
        and not jacobian.any()
        and not torch.equal(call(call.resid_pre)[0, token], call.resid_pre[0, token])
    ):
        raise CouplingError(
            f"got a Jacobian of block {call.layer} that is exactly zero though the block changes its token, expected "
            "derivatives of it; take torch.no_grad and detach out of the model's own code"
        )


def _relative_errors(
    u: Float[Tensor, " d_model"],
    jacobians: Float[Tensor, "prompt d_model d_model"],
    truth: Float[Tensor, "prompt d_model"],
    lost: float,
) -> Float[Tensor, " prompt"]:
    return (u @ jacobians - truth).norm(dim=-1) / torch.maximum(truth.norm(dim=-1), lost * u.norm())
