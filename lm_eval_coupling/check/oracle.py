"""Comparison of every kind of block with plain automatic differentiation.

The oracle is the unmodified block of transformers, copied in float64, with one backward pass for
each row of its Jacobian. It shares only the block's input and arguments with the measurement.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.jacobians.certify import TOLERANCE, probe
from lm_eval_coupling.jacobians.engine import jacobians_of_traces
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.residual import TrueDtype
from lm_eval_coupling.residual.arguments import detached
from lm_eval_coupling.residual.block_call import hidden

ROWS = 64  # At most so many rows are compared: each takes a backward pass through the block.


@dataclasses.dataclass(frozen=True)
class BlockCheck:
    """Result of the comparison for one kind of block.

    Attributes:
        kind: name of the kind.
        blocks: number of blocks of this kind.
        layer: index of the compared block.
        level: level at which it was measured.
        why: why no faster level was taken, or None.
        certificate: largest certificate of the blocks of this kind.
        rows: number of compared rows.
        error: relative error against the oracle, or None if it failed.
        problem: why the oracle failed, or None.
    """

    kind: str
    blocks: int
    layer: int
    level: str
    why: str | None
    certificate: float
    rows: int
    error: float | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """True if the Jacobian agrees with the oracle and with its certificate."""
        tolerance = TOLERANCE[torch.float32]
        return self.error is not None and self.error <= tolerance and self.certificate <= tolerance


def kinds(
    layers: Sequence[nn.Module], layer_types: Sequence[str] | None = None
) -> dict[str, list[int]]:
    """Return the indices of blocks with equal modules and shapes of weights, by kind."""
    members_of: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        parts = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        kind = layer_types[index] if layer_types and len(layer_types) == len(layers) else ""
        members_of.setdefault((type(layer).__name__, kind, parts, shapes), []).append(index)
    named: dict[str, list[int]] = {}
    for (module, kind, *_), members in members_of.items():
        name = f"{module} ({kind})" if kind else module
        named[name if name not in named else f"{name}, from {members[0]}"] = members
    return named


@exact_arithmetic()
def check_blocks(
    model: Any, original: nn.Module, tokens: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[BlockCheck]:
    """Compare one block of every kind with the oracle, at the last token of a prompt.

    Args:
        model: the :class:`~lm_eval_coupling.residual.ResidualModel` of ``original``.
        original: the transformers model that was loaded.
        tokens: token ids.
        dtype: arithmetic of the measurement.

    Returns:
        One check per kind, in the order in which the kinds first occur.
    """
    layers, token = list(decoder_layers(original, model.n_layers)), len(tokens) - 1
    layer_types = getattr(cast(Any, original).config.get_text_config(), "layer_types", None)
    (trace,) = model.traces([tokens], dtype, [token], probe)
    (measured,) = jacobians_of_traces([trace], [token], method="auto")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(model.d_model, generator=generator)[:ROWS]
    checks = []
    for kind, members in kinds(layers, layer_types).items():
        layer = members[0]
        error, problem = None, None
        try:
            truth = oracle(layers[layer], trace.calls[layer], token, rows)
            jacobian = measured.jacobians[layer]
            compared = jacobian[rows.to(jacobian.device)].to(truth)
            error = ((compared - truth).norm() / truth.norm().clamp_min(1e-3)).item()
        except Exception as failure:
            problem = f"{type(failure).__name__}: " + " ".join(str(failure).split())[:160]
        checks.append(
            BlockCheck(
                kind=kind,
                blocks=len(members),
                layer=layer,
                level=measured.method[layer],
                why=measured.why[layer],
                certificate=torch.tensor([measured.certificate[i] for i in members]).max().item(),
                rows=len(rows),
                error=error,
                problem=problem,
            )
        )
    return checks


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the list of ``count`` modules with most weights: the blocks of the model."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def oracle(
    block: nn.Module, call: Any, token: int, rows: Int[Tensor, " row"]
) -> Float[Tensor, "row d_model"]:
    """Compute rows of ∂f(token)/∂x(token), one backward pass each.

    Returns:
        Rows in float64, on the block's device, or on the CPU if that device has no float64.
    """
    device = torch.device("cpu") if call.resid_pre.device.type == "mps" else call.resid_pre.device
    dtype = torch.float64
    plain = copy.deepcopy(block).to(device, dtype).eval().requires_grad_(False)

    def to_float64(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    arguments = (detached(call.arguments.args), detached(call.arguments.kwargs))
    args, kwargs = tree_map_only(Tensor, to_float64, arguments)
    x = to_float64(call.resid_pre).requires_grad_(True)
    with torch.enable_grad(), TrueDtype(dtype):
        contribution = (hidden(plain(x, *args, **kwargs)) - x)[0, token]
    gradients = [
        torch.autograd.grad(contribution[i], x, retain_graph=True)[0][0, token]
        for i in rows.tolist()
    ]
    return torch.stack(gradients)
