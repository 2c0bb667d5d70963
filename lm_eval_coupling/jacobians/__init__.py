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
from lm_eval_coupling.jacobians.certify import TOLERANCE, certify
from lm_eval_coupling.jacobians.closed import closed_jacobian
from lm_eval_coupling.jacobians.token_local import token_local_jacobian

LEVELS = {"closed": closed_jacobian, "token-local": token_local_jacobian, "autodiff": autodiff_jacobian}
BUDGET = 1 << 30  # bytes that the directions differentiated at once may take
STACK = 4 << 30  # bytes of Jacobians that may lie on the model's device; more go to the host, layer by layer


@dataclasses.dataclass(frozen=True)
class BlockJacobians:
    """Jacobians of several blocks for one pair of tokens.

    ``certificate`` is each layer's relative error against the model's own derivative, ``method`` the level each layer was
    computed at, ``layers`` their indices.
    """

    jacobians: Float[Tensor, "layer d_model d_model"]
    certificate: Float[Tensor, " layer"]
    method: list[str]
    layers: list[int]


def block_jacobians(
    model,
    tokens: Int[Tensor, "1 seq"],
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
        tokens: token ids of one prompt.
        output_token: t2; negative counts from the end.
        input_token: t1; ``None`` means t1 = t2. For t1 > t2 a causal model's Jacobian is exactly zero.
        layers: block indices from 0; ``None`` means all.
        method: ``auto``, ``closed``, ``token-local`` or ``autodiff``.
        dtype: arithmetic, ``torch.float32`` or ``torch.float64``, whatever dtype the model runs in.

    Returns:
        J[l, i, j] = ∂f^l_i(output token) / ∂x^{l-1}_j(input token): n_layers·d_model² numbers, on the model's device up to
        4 GiB and on the host beyond.

    Raises:
        CouplingError: for a token or layer that does not exist, or an unknown method or dtype.
    """
    seq = torch.as_tensor(tokens).numel()
    t2 = resolve_token(output_token, seq)
    t1 = t2 if input_token is None else resolve_token(input_token, seq)
    check_method(method)
    trace = model.trace(tokens, dtype, t2)
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    if bad := [layer for layer in layers if not -model.n_layers <= layer < model.n_layers]:
        raise CouplingError(f"got layer {bad[0]}, expected 0 to {model.n_layers - 1}")
    return jacobians_of_trace(trace, t2, t1, [layer % model.n_layers for layer in layers], method)


def jacobians_of_trace(trace, output_token: int, input_token: int, layers: Sequence[int], method: str) -> BlockJacobians:
    """As :func:`block_jacobians`, from a :class:`~lm_eval_coupling.residual.ResidualTrace` and absolute indices."""
    check_method(method)
    d_model, like = trace.resid_final.shape[-1], trace.resid_final
    on_device = len(layers) * d_model**2 * like.element_size() <= STACK
    stack = like.new_empty(len(layers), d_model, d_model, device=like.device if on_device else "cpu")
    certificate, levels = torch.empty(len(layers), dtype=torch.float64), []
    for i, layer in enumerate(layers):
        stack[i], certificate[i], level = certified_jacobian(trace.calls[layer], output_token, input_token, method)
        levels.append(level)
    return BlockJacobians(stack, certificate, levels, list(layers))


def certified_jacobian(call, output_token: int, input_token: int, method: str) -> tuple[Tensor, float, str]:
    """J of one block with its certificate and the level it comes from; ``auto`` falls to the next level on failure."""
    levels = list(LEVELS) if method == "auto" else [method]
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
            if error <= TOLERANCE[call.dtype] or level == levels[-1]:
                return jacobian, error, level
    raise AssertionError("unreachable: the last level returns or raises")


def resolve_token(token: int, seq: int) -> int:
    """Absolute index of ``token``; negative counts from the end."""
    if not -seq <= token < seq:
        raise CouplingError(f"got token {token} of a prompt of {seq} tokens, expected {-seq} to {seq - 1}")
    return token % seq


def check_method(method: str) -> None:
    """Refuse an unknown level by name."""
    if method not in ("auto", *LEVELS):
        raise CouplingError(f"got method {method!r}, expected one of auto, {', '.join(LEVELS)}")
