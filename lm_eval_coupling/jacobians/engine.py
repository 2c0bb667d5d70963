"""Exact block Jacobians.

What is differentiated: f^l = F^l − identity, F^l being the block as a map of the residual stream, from the block's input
(`hook_resid_pre`) to its output (`hook_resid_post`): before the final norm, skip connection excluded. One block, one input
token, one output token: J[i, j] = ∂f^l_i(token t2) / ∂x^{l-1}_j(token t1) (paper, eq. 8). Nothing is averaged, summed over
positions or approximated; TransformerLens' `JacobianLens` is averaged and reaches to the final layer, and the paper's
release differentiates norm∘block in its last layer.

Levels: ``closed`` (matrix products, where every step has a rule), ``token-local`` (one-token passes, any softmax attention),
``autodiff`` (whole sequence, any model). ``auto`` takes the first whose result agrees with the model's own derivative
(certify.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.autodiff import autodiff_jacobian
from lm_eval_coupling.jacobians.certify import (
    TOLERANCE,
    certify,
    certify_each,
    probe,
    require_not_constant,
    require_true_gradients,
)
from lm_eval_coupling.jacobians.closed import closed_jacobian, closed_jacobians
from lm_eval_coupling.jacobians.protocol import Call, Model, Trace
from lm_eval_coupling.jacobians.token_local import token_local_jacobian
from lm_eval_coupling.numerics.memory import jacobian_stack
from lm_eval_coupling.numerics.precision import exact_arithmetic

LEVELS = {"closed": closed_jacobian, "token-local": token_local_jacobian, "autodiff": autodiff_jacobian}
BUDGET = 1 << 30  # bytes that the directions differentiated at once may take


@dataclasses.dataclass(frozen=True)
class BlockJacobians:
    """Jacobians of several blocks for one pair of tokens.

    ``certificate`` is each layer's relative error against the model's own derivative, ``method`` the level each layer was
    computed at, ``layers`` their indices, ``device`` where the model computed (the Jacobians may lie on the host).
    """

    jacobians: Float[Tensor, "layer d_model d_model"]
    certificate: Float[Tensor, " layer"]
    method: list[str]
    layers: list[int]
    device: torch.device


@exact_arithmetic()
@torch.no_grad()
def block_jacobians(
    model: Model,
    tokens: Int[Tensor, "1 seq"] | Float[Tensor, "1 channel height width"],
    *,
    output_token: int = -1,
    input_token: int | None = None,
    layers: Sequence[int] | None = None,
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> BlockJacobians:
    """Exact Jacobians J^l_{t1 t2} of every block for one prompt (paper, eq. 8).

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids of one prompt, or pixel values of one image.
        output_token: t2; negative counts from the end.
        input_token: t1; ``None`` means t1 = t2. For t1 > t2 a causal model's Jacobian is exactly zero.
        layers: block indices from 0; ``None`` means all.
        method: ``auto``, ``closed``, ``token-local`` or ``autodiff``.
        dtype: arithmetic, ``torch.float32`` or ``torch.float64``, whatever dtype the model runs in.

    Returns:
        J[l, i, j] = ∂f^l_i(output token) / ∂x^{l-1}_j(input token): n_layers·d_model² numbers, on the model's device up to
        4 GiB, beyond on the host, and in a temporary file where half of its free memory does not hold them.

    Raises:
        CouplingError: for a token or layer that does not exist, or an unknown method or dtype.
    """
    prompt = model.encode(tokens) if torch.is_floating_point(torch.as_tensor(tokens)) else tokens
    seq = torch.as_tensor(prompt).numel()
    t2 = resolve_token(output_token, seq)
    t1 = t2 if input_token is None else resolve_token(input_token, seq)
    check_method(method)
    (trace,) = model.traces([prompt], dtype, [t2], probe)
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    if bad := [layer for layer in layers if not -model.n_layers <= layer < model.n_layers]:
        raise CouplingError(f"got layer {bad[0]}, expected 0 to {model.n_layers - 1}")
    return jacobians_of_trace(trace, t2, t1, [layer % model.n_layers for layer in layers], method)


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_trace(
    trace: Trace, output_token: int, input_token: int, layers: Sequence[int], method: str
) -> BlockJacobians:
    """As :func:`block_jacobians`, from a trace and absolute indices."""
    check_method(method)
    stack = _Stack(trace.resid_final, layers)
    for layer in layers:
        stack.add(*certified_jacobian(trace.calls[layer], output_token, input_token, method))
    return stack.filled()


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_traces(traces: Sequence[Trace], tokens: Sequence[int], method: str) -> list[BlockJacobians]:
    """J_tt of every block for several prompts of one model, each at its own token t, as absolute index.

    Where the closed level has rules, its steps are gone through once for all prompts. Memory: that of one prompt times
    their number.
    """
    check_method(method)
    layers = range(len(traces[0].calls))
    stacks = [_Stack(trace.resid_final, layers) for trace in traces]
    for layer in layers:
        calls = [trace.calls[layer] for trace in traces]
        for stack, found in zip(stacks, certified_jacobians(calls, tokens, method), strict=True):
            stack.add(*found)
    return [stack.filled() for stack in stacks]


class _Stack:
    """The Jacobians of one prompt as they are made."""

    def __init__(self, like: Tensor, layers: Sequence[int]) -> None:
        self.layers, self.device = list(layers), like.device
        self.jacobians = jacobian_stack(len(layers), like)
        self.errors: list[float] = []
        self.levels: list[str] = []

    def add(self, jacobian: Tensor, error: float, level: str) -> None:
        self.jacobians[len(self.levels)] = jacobian
        self.errors.append(error)
        self.levels.append(level)

    def filled(self) -> BlockJacobians:
        certificate = torch.tensor(self.errors, dtype=torch.float64)
        return BlockJacobians(self.jacobians, certificate, self.levels, self.layers, self.device)


def certified_jacobians(calls: Sequence[Call], tokens: Sequence[int], method: str) -> list[tuple[Tensor, float, str]]:
    """:func:`certified_jacobian` of one block's J_tt for several prompts: together where that is certified, else alone."""
    together = _closed_together(calls, tokens) if len(calls) > 1 and method in ("auto", "closed") else {}
    return [
        together[i] if i in together else certified_jacobian(call, token, token, method)
        for i, (call, token) in enumerate(zip(calls, tokens, strict=True))
    ]


def _closed_together(calls: Sequence[Call], tokens: Sequence[int]) -> dict[int, tuple[Tensor, float, str]]:
    """Those prompts of a batch for which the closed level gives what the model's own derivative says."""
    with calls[0].ready():
        try:
            found = closed_jacobians(calls, tokens)
        except Exception:  # alone, each prompt finds the level that can, or says what is wrong
            return {}
        found.diagonal(dim1=1, dim2=2).sub_(1)
        errors = certify_each(calls, found, tokens)
    return {i: (found[i], error, "closed") for i, error in enumerate(errors) if error <= TOLERANCE[calls[0].dtype]}


def certified_jacobian(call: Call, output_token: int, input_token: int, method: str) -> tuple[Tensor, float, str]:
    """J of one block with its certificate and the level it comes from; ``auto`` falls to the next level on failure."""
    levels = list(LEVELS) if method == "auto" else [method]
    if input_token > output_token:
        call = call.without_keys()  # what an attention core is recorded from ends at the output token
    with call.ready():
        for level in levels:
            try:
                jacobian = LEVELS[level](call, output_token, input_token, BUDGET)
                if output_token == input_token:
                    jacobian.diagonal().sub_(1)
                error = certify(call, jacobian, output_token, input_token)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if level == levels[-1]:
                    raise
                continue
            if error <= TOLERANCE[call.dtype]:
                _require_derivative(call, jacobian, error, (output_token, input_token), level)
            if error <= TOLERANCE[call.dtype] or level == levels[-1]:
                return jacobian, error, level
    raise AssertionError("unreachable: the last level returns or raises")


def _require_derivative(call: Call, jacobian: Tensor, error: float, tokens: tuple[int, int], level: str) -> None:
    """What agrees with autograd must also be how the block really moves: a part of it may run without gradients."""
    output_token, input_token = tokens
    if output_token == input_token:
        require_not_constant(call, jacobian, error, output_token)
    if level != "closed" and input_token <= output_token:
        require_true_gradients(call, jacobian, output_token, input_token)


def resolve_token(token: int, seq: int) -> int:
    """Absolute index of ``token``; negative counts from the end."""
    if not -seq <= token < seq:
        raise CouplingError(f"got token {token} of a prompt of {seq} tokens, expected {-seq} to {seq - 1}")
    return token % seq


def check_method(method: str) -> None:
    """Refuse an unknown level by name."""
    if method not in ("auto", *LEVELS):
        raise CouplingError(f"got method {method!r}, expected one of auto, {', '.join(LEVELS)}")
