"""Load-time consistency checks.

The measuring module tree is held to the model that is scored, and the bridge to that tree.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual import rotary
from lm_eval_coupling.residual.arguments import tensors_in
from lm_eval_coupling.residual.attachments import own_hooks
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.block_call import BlockCall, hidden
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.trace import ResidualTrace
from lm_eval_coupling.residual.weights import float_dtype, present

SAME = 1e-4  # the same function in float32, step by step
SAME_KERNELS = 1e-2  # the same function in the model's own dtype, by the same kernels
OTHER_KERNELS = 1e-3  # the same function in float32, attention computed in another way
ROUNDED = 5e-2  # in bf16 or fp16, in another order
HALF = 0.25  # half precision against float32, at the token that loses least: some lose all digits
PACKED = 0.25  # packed layers may also round what they are given


def off_by(tensor: Tensor, expected: Tensor) -> float:
    """Return the relative difference; 0 if ``expected`` is not finite.

    Numbers that are not finite are reported prompt by prompt, so that the score is kept.
    """
    if not torch.isfinite(expected).all():
        return 0.0
    return ((tensor.to(expected) - expected).norm() / expected.norm()).item()


def largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN if one is NaN, which Python's ``max`` may pass over."""
    return torch.tensor([*errors], dtype=torch.float64).max().item()


def nearest_token(
    stream: Float[Tensor, "token d_model"],
    expected: Float[Tensor, "token d_model"],
    size: Float[Tensor, " token"],
) -> int:
    """Return the token of the least error, relative to ``size``, of those that have numbers.

    The first token is returned if ``expected`` has numbers at none.
    """
    errors = ((stream - expected).norm(dim=-1) / size).nan_to_num(nan=math.inf)
    tokens = expected.isfinite().all(dim=-1).nonzero()[:, 0]
    return int(tokens[errors[tokens].argmin()]) if len(tokens) else 0


def require_close(what: str, name: str, tensor: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise CouplingError unless ``tensor`` is ``expected``: another function would be measured."""
    error = off_by(tensor, expected)
    if error <= tolerance:
        return
    if not expected.isfinite().all() or not expected.any():
        raise CouplingError(
            f"got a {name} that gives {what} that are not finite or nothing but zeros when it is "
            "scored, expected weights and activations within the range of their dtype"
        )
    raise CouplingError(
        f"got {what} off by {error:.1e} from what {name} gives when it is scored, expected "
        "the same; score it with --model hf, or with coupling_limit=0"
    )


def require_close_somewhere(
    what: str,
    name: str,
    stream: Float[Tensor, "token d_model"],
    expected: Float[Tensor, "token d_model"],
    tolerance: float,
) -> None:
    """Apply :func:`require_close` to the nearest token.

    Half precision leaves nothing of some tokens; another function spares none.

    Raises:
        CouplingError: if no token of ``stream`` is as expected.
    """
    nearest = nearest_token(stream.to(expected), expected, expected.norm(dim=-1))
    require_close(what, name, stream[nearest], expected[nearest], tolerance)


@torch.no_grad()
def answer_of(model: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    """Return a model's logits for the probe, in float32, as if no pass had gone before."""
    arguments = inputs.batch([inputs.probe], device, float_dtype(model)).arguments
    with rotary.unused_tables(model):
        return inputs.read(model(**arguments)).float()


def end_of(
    model: nn.Module, module: nn.Module, inputs: Inputs, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what ``module`` hands on in a pass of ``model`` and that pass' logits, in float32."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        streams.append(hidden(output))

    with module.register_forward_hook(keep):
        logits = answer_of(model, inputs, device)
    return streams[0].float(), logits


def require_shared_weights(twin: nn.Module, original: nn.Module) -> None:
    """Raise CouplingError unless the twin uses every weight where it lies."""
    shared = {p.data_ptr() for p in twin.parameters()}
    processed = [name for name, p in present(original) if p.data_ptr() not in shared]
    if processed:
        raise CouplingError(
            f"got {len(processed)} weights that were replaced (first: {processed[0]}), expected "
            "shared storage; do not fold norms or use compatibility mode"
        )


def require_whole_blocks(blocks: Sequence[Block]) -> None:
    """Raise CouplingError unless every block lies on one device."""
    for block in blocks:
        if len(devices := {t.device for t in block.module.parameters()}) > 1:
            raise CouplingError(
                f"got block {block.layer} spread over {sorted(map(str, devices))}, expected each "
                "block on one device; keep blocks whole in the device_map"
            )


def held_fixed(trace: ResidualTrace) -> list[str]:
    """Name the arguments by which blocks hand something to later ones, held fixed for these."""
    first, last = trace.calls[0].arguments.kwargs, trace.calls[-1].arguments.kwargs
    return [name for name in last if len(tensors_in(last[name])) > len(tensors_in(first.get(name)))]


def require_chain(trace: ResidualTrace) -> None:
    """Raise CouplingError unless every block is given what the one before it hands on."""
    for call, following in zip(trace.calls, trace.calls[1:], strict=False):
        assert call.resid_post is not None  # a trace keeps it
        if not off_by(following.resid_pre, call.resid_post) <= ROUNDED:
            raise CouplingError(
                f"got a block {call.layer} whose output is not the next one's input, expected a "
                "residual stream"
            )


@torch.no_grad()
def require_residual_stream(name: str, calls: Sequence[BlockCall], final: Tensor) -> None:
    """Require that blocks, replayed alone, hand their outputs on and add to their inputs.

    They are replayed with and without gradients.

    Raises:
        CouplingError: if not.
    """
    streams = [call.resid_pre for call in calls] + [final]
    kinds = {type(call.module): call.layer for call in calls}
    for call, following in zip(calls, streams[1:], strict=True):
        if call.resid_pre.dim() != 3 or following.shape != call.resid_pre.shape:
            raise CouplingError(
                f"got a {name} whose block {call.layer} hands on a tensor of shape "
                f"{[*following.shape]} for one of shape {[*call.resid_pre.shape]}, expected one "
                "vector for each token; score it with --model hf"
            )
        with call.ready():
            output = call(call.resid_pre)
            with torch.enable_grad():
                recorded = call(call.resid_pre.detach().requires_grad_(True)).detach()
        if not torch.isfinite(output).all():
            return  # reported prompt by prompt, so that the score is kept
        scale = output.abs().max().item()
        if not torch.allclose(output, following.to(output), rtol=1e-3, atol=1e-4 * scale):
            raise CouplingError(
                f"got a {name} whose block {call.layer} does not hand its output on as the next "
                "block's input, expected a residual stream; score it with --model hf"
            )
        if not torch.allclose(recorded, output, rtol=1e-3, atol=1e-4 * scale):
            raise CouplingError(
                f"got a {name} whose block {call.layer} gives another output while gradients are "
                "recorded, expected the one that is scored; take torch.is_grad_enabled and "
                "requires_grad out of the conditions of hooks and functions"
            )
        if kinds[type(call.module)] == call.layer or any(own_hooks(call.module)):
            _require_skip(name, call)


def _require_skip(name: str, call: BlockCall) -> None:
    """Require that a block without weights hands on its input, or a multiple of it.

    Two inputs are compared: a constant, such as a steering vector, is the same in both. A norm on
    the skip connection gives the same for ``x`` and ``x / 2``.

    Raises:
        CouplingError: if it does not.
    """
    x = call.resid_pre
    with _zeroed(call.module, call.dtype):
        left = call(x) - call(x / 2)
    scale = (left * x).sum() / x.square().sum()
    if torch.isfinite(left).all() and not (scale > 0 and off_by(left, scale * x) <= SAME):
        cause = "the norm is on the skip connection, or there are several streams"
        if any(own_hooks(call.module)):
            cause = "its hooks change what the skip connection carries"
        raise CouplingError(
            f"got a {name} whose block {call.layer} does not add to its input ({cause}), expected "
            "F(x) = x + f(x); score it with --model hf"
        )


@contextlib.contextmanager
def _zeroed(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    weights = [p for p in module.parameters() if p.is_floating_point()]
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    kept: list[tuple[Tensor, Tensor]] = [(tensor, tensor.data) for tensor in [*weights, *buffers]]
    try:
        for tensor in weights:
            tensor.data = torch.zeros((), dtype=dtype, device=tensor.device).expand(tensor.shape)
        for buffer in buffers:
            buffer.data = buffer.data.to(dtype)
        yield
    finally:
        for changed, data in kept:
            changed.data = data
