"""Certificates: every Jacobian is compared with the block's own derivative before it is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.methods import BYTES
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.numerics.devices import has_float64

DTYPES = {name: getattr(torch, name) for name in BYTES}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def probe(layer: int, stream: Float[Tensor, "*shape d_model"]) -> Float[Tensor, " d_model"]:
    """Return the fixed random direction u that a layer's Jacobian is checked along.

    It is in the dtype and on the device of ``stream``, and the same on every machine.
    """
    return _probe(layer, stream.shape[-1], stream.dtype, stream.device)


# A direction comes from the host, and is needed several times per block and prompt.
@functools.lru_cache(maxsize=512)
def _probe(
    layer: int, d_model: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " d_model"]:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(d_model, generator=generator, dtype=torch.float64).to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Truth:
    """∂(u·f)/∂x of one block by backpropagation, which uᵀJ is compared with.

    Attributes:
        u: the block's fixed random direction.
        derivative: ∂(u·f)/∂x.
        lost: smallest ‖derivative‖ / ‖u‖ that errors are relative to; below it the rounding of the
            identity hides them.
        finer: the call in float64, if J is so small that float32 would leave it too few digits.
    """

    u: Float[Tensor, " d_model"]
    derivative: Float[Tensor, " d_model"]
    lost: float
    finer: Call | None = None

    @classmethod
    def of(cls, call: Call, output_token: int, input_token: int) -> Truth:
        """Take the derivative by one backward pass, and by one in float64 where J_tt is small.

        Args:
            call: the block's call, inside its ``ready()`` context.
            output_token: absolute index.
            input_token: absolute index.

        Returns:
            The derivative in the call's dtype, or in float64 together with the call in float64.
        """
        u, lost = probe(call.layer, call.resid_pre), _lost(call.dtype, call.dtype)
        pulled = pulled_back(call, output_token, input_token)
        if output_token != input_token:
            return cls(u, pulled, lost)
        if (pulled - u).norm() >= lost * u.norm() or not has_finer(call):
            return cls(u, pulled - u, lost)
        finer = call.in_dtype(torch.float64)
        u, lost = probe(finer.layer, finer.resid_pre), _lost(torch.float64, call.dtype)
        with finer.ready():
            return cls(u, pulled_back(finer, output_token, input_token) - u, lost, finer)

    @property
    def is_small(self) -> bool:
        """True if float32 has too few digits for the sum of J and the identity."""
        return bool(self.derivative.norm() < _lost(torch.float32, torch.float32) * self.u.norm())

    def error(self, jacobian: Float[Tensor, "d_model d_model"]) -> float:
        """Return ‖uᵀJ − ∂(u·f)/∂x‖ / max(‖∂(u·f)/∂x‖, lost ‖u‖); NaN for a J that is not finite."""
        jacobians, derivatives = jacobian[None].to(self.u.dtype), self.derivative[None]
        return _relative_errors(self.u, jacobians, derivatives, self.lost).item()


def _lost(arithmetic: torch.dtype, dtype: torch.dtype) -> float:
    """Return the smallest relative ‖J‖ for which four roundings of I + J are within tolerance."""
    return 4 * torch.finfo(arithmetic).eps / TOLERANCE[dtype]


def has_finer(call: Call) -> bool:
    """Return whether the call can be repeated in an arithmetic with more digits."""
    return call.dtype == torch.float32 and has_float64(call.resid_pre.device)


def certify(
    call: Call, jacobian: Float[Tensor, "d_model d_model"], output_token: int, input_token: int
) -> float:
    """Return the relative error of uᵀJ against one backward pass through the whole block.

    Args:
        call: the block's call, inside its ``ready()`` context.
        jacobian: J of the block *without* its skip connection.
        output_token: absolute index.
        input_token: absolute index.

    Returns:
        :meth:`Truth.error` of the Jacobian.
    """
    return Truth.of(call, output_token, input_token).error(jacobian)


def certify_each(
    calls: Sequence[Call], jacobians: Float[Tensor, "prompt d_model d_model"], tokens: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """Return :func:`certify` of J_tt of several prompts of one block, each at its own token t.

    Nothing is read from the device.

    Returns:
        Errors, NaN where J is so small that only a finer arithmetic can tell.
    """
    u, lost = probe(calls[0].layer, calls[0].resid_pre), _lost(calls[0].dtype, calls[0].dtype)
    truth = pulled_back_each(calls, tokens) - u
    errors = _relative_errors(u, jacobians, truth, lost)
    if not has_finer(calls[0]):
        return errors
    return torch.where(truth.norm(dim=-1) < lost * u.norm(), torch.nan, errors)


def pulled_back(call: Call, output_token: int, input_token: int) -> Float[Tensor, " d_model"]:
    """Return uᵀ ∂F_{output} / ∂X_{input} for the block's direction u.

    It was taken with the trace, or is taken by a step of decoding, or through the whole block.
    """
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
    """Return :func:`pulled_back` of several prompts, each from its own token to itself.

    They are taken together if they kept keys.

    Returns:
        A row per prompt; NaN where a step of decoding is not the block. Such a prompt is pulled
        back through its whole sequence when it is done alone.

    Raises:
        RuntimeError: by the device, if its memory does not hold the prompts together.
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
    """Return the call with its pullback from ``output_token``, taken by one pass if it is missing.

    Every Jacobian to that token is then certified at no further cost.
    """
    if call.pullback is not None and call.pullback[0] == output_token:
        return call
    with call.ready():
        pulled = call.pulled_back(probe(call.layer, call.resid_pre), output_token)
    return call.with_pullback(output_token, pulled)


def _relative_errors(
    u: Float[Tensor, " d_model"],
    jacobians: Float[Tensor, "prompt d_model d_model"],
    truth: Float[Tensor, "prompt d_model"],
    lost: float,
) -> Float[Tensor, " prompt"]:
    return (u @ jacobians - truth).norm(dim=-1) / torch.maximum(truth.norm(dim=-1), lost * u.norm())
