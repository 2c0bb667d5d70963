"""Every kind of block against plain automatic differentiation of the unmodified model's own.

What is compared with shares nothing with the measurement but the stream and the arguments that the block was given: the
block as transformers has it, copied in float64, and one backward pass for each row of its Jacobian.
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
from lm_eval_coupling.residual.argument import carried
from lm_eval_coupling.residual.block_call import hidden

ROWS = 64  # of a Jacobian that are compared where it has more: each takes a backward pass through the whole block


@dataclasses.dataclass(frozen=True)
class BlockCheck:
    """One kind of block: how many there are, how one of them was measured, and how far it is from the truth."""

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
        """Whether the Jacobian is the block's."""
        tolerance = TOLERANCE[torch.float32]
        return self.error is not None and self.error <= tolerance and self.certificate <= tolerance


def kinds(
    layers: Sequence[nn.Module], layer_types: Sequence[str] | None = None
) -> dict[str, list[int]]:
    """Indices of blocks made of the same modules with weights of the same shapes, by a name for the kind."""
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        parts = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        kind = layer_types[index] if layer_types and len(layer_types) == len(layers) else ""
        found.setdefault((type(layer).__name__, kind, parts, shapes), []).append(index)
    named: dict[str, list[int]] = {}
    for (module, kind, *_), members in found.items():
        name = f"{module} ({kind})" if kind else module
        named[name if name not in named else f"{name}, from {members[0]}"] = members
    return named


@exact_arithmetic()
def check_blocks(
    model: Any, original: nn.Module, tokens: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[BlockCheck]:
    """One block of every kind, at the last token of a prompt.

    Args:
        model: the :class:`~lm_eval_coupling.residual.ResidualModel` of ``original``.
        original: the transformers model as it was loaded.
        tokens: token ids.
        dtype: arithmetic of the measurement.

    Returns:
        One check per kind, in the order in which the kinds first occur.
    """
    layers, token = list(decoder_layers(original, model.n_layers)), len(tokens) - 1
    (trace,) = model.traces([tokens], dtype, [token], probe)
    (found,) = jacobians_of_traces([trace], [token], "auto")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(model.d_model, generator=generator)[:ROWS]
    checks = []
    for kind, members in kinds(
        layers, getattr(cast(Any, original).config.get_text_config(), "layer_types", None)
    ).items():
        layer = members[0]
        error, problem = None, None
        try:
            truth = oracle(layers[layer], trace.calls[layer], token, rows)
            measured = found.jacobians[layer][rows.to(found.jacobians.device)].to(truth)
            error = ((measured - truth).norm() / truth.norm().clamp_min(1e-3)).item()
        except Exception as failure:
            problem = f"{type(failure).__name__}: " + " ".join(str(failure).split())[:160]
        checks.append(
            BlockCheck(
                kind=kind,
                blocks=len(members),
                layer=layer,
                level=found.method[layer],
                why=found.why[layer],
                certificate=max(float(found.certificate[i]) for i in members),
                rows=len(rows),
                error=error,
                problem=problem,
            )
        )
    return checks


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The blocks of a transformers model: of its lists of ``count`` modules the one with most weights."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def oracle(
    block: nn.Module, call: Any, token: int, rows: Int[Tensor, " row"]
) -> Float[Tensor, "row d_model"]:
    """Rows of ∂f(token)/∂x(token), row by row, in float64 on the block's device (on the CPU where that has none)."""
    device = torch.device("cpu") if call.resid_pre.device.type == "mps" else call.resid_pre.device
    dtype = torch.float64
    plain = copy.deepcopy(block).to(device, dtype).eval().requires_grad_(False)

    def there(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    arguments = (carried(call.arguments.args), carried(call.arguments.kwargs))
    args, kwargs = tree_map_only(Tensor, there, arguments)
    x = there(call.resid_pre).requires_grad_(True)
    with torch.enable_grad(), TrueDtype(dtype):
        contribution = (hidden(plain(x, *args, **kwargs)) - x)[0, token]
    gradients = [
        torch.autograd.grad(contribution[i], x, retain_graph=True)[0][0, token]
        for i in rows.tolist()
    ]
    return torch.stack(gradients)
