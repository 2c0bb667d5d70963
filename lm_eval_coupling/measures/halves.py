"""Coupling of the blocks' halves: attention Jacobians among each other, and MLP Jacobians."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_coupling.errors import Reason, Unmeasurable
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.depth import undefined_pairs
from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of
from lm_eval_coupling.measures.registry import Column, Measure, prompt_by_prompt, ranked_reading

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.jacobians.protocol import Call
    from lm_eval_coupling.measures.contract import TracedPrompt

HALVES = ("attention", "mlp")
_SLACK = 10  # Two Jacobians and a product may be off by this many tolerances of one Jacobian.


def _measure(prompt: TracedPrompt) -> MeasureResult:
    """Couple the attention Jacobians of all blocks with each other, and so the MLP Jacobians."""
    import torch

    from lm_eval_coupling.measures.formulas.miscoupling import normalized_by_rank
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.spectra import top_singular
    from lm_eval_coupling.numerics.transfer import on_host

    ranks, device = prompt.settings.ranks, prompt.trace.resid_final.device
    blocks = [_half_jacobians(prompt, call) for call in prompt.trace.calls]
    columns: dict[str, object] = {
        "halves_certificate": [[errors[i] for _, errors in blocks] for i in range(len(HALVES))]
    }
    reasons: list[Reason] = []
    for i, half in enumerate(HALVES):
        J = off_mps(torch.stack([jacobians[i].to(device) for jacobians, _ in blocks]))
        triplets = top_singular(J, ranks[-1])
        pairs = on_host(normalized_by_rank(J, triplets, ranks))
        columns |= {f"{half}_miscoupling": pairs, f"{half}_singular_values": triplets.S}
        columns[f"{half}_coupling"] = couplings_of(pairs)
        reasons += undefined_pairs(pairs[-1], f" of the {half} halves")
    return MeasureResult(columns, tuple(reasons))


def _half_jacobians(prompt: TracedPrompt, call: Call) -> tuple[list[Tensor], list[float]]:
    """Return J of attention and MLP at the measured token, and their certificates."""
    from lm_eval_coupling.jacobians.certify import TOLERANCE
    from lm_eval_coupling.jacobians.levels import certified_jacobian

    token, tolerance = prompt.position, TOLERANCE[call.dtype]
    halves = zip(HALVES, (prompt.attention_alone(call), prompt.mlp_alone(call)), strict=True)
    jacobians, errors = [], []
    for half, cut in halves:
        with cut as half_call:
            certified = certified_jacobian(half_call, token, token, prompt.settings.method)
        if not certified.error <= tolerance:
            raise Unmeasurable(
                "certificate",
                f"the Jacobian of the {half} half of block {call.layer} ({certified.level}) is off "
                f"by {certified.error:.1e}, expected at most {tolerance:.0e}",
            )
        jacobians.append(certified.jacobian)
        errors.append(certified.error)
    _require_sum(call, jacobians, token)
    return jacobians, errors


def _require_sum(call: Call, jacobians: list[Tensor], token: int) -> None:
    """Require that both halves make up the block, side by side or one after the other."""
    from lm_eval_coupling.jacobians.certify import TOLERANCE, probe, pulled_back

    attention, mlp = jacobians
    u = probe(call.layer, call.resid_pre)
    with call.ready():
        block = pulled_back(call, token, token) - u
    parallel = u @ attention + u @ mlp
    sequential = parallel + (u @ mlp) @ attention
    error = min(float((block - halves).norm()) for halves in (parallel, sequential))
    allowed = _SLACK * TOLERANCE[call.dtype] * float(u.norm() + block.norm())
    if not error <= allowed:
        raise Unmeasurable(
            "refused", f"attention and MLP do not add up to block {call.layer}: off by {error:.1e}"
        )


MEASURES = (
    Measure(
        name="halves",
        doc="Coupling of the blocks' halves, f = a + m: the Jacobians ∂a/∂x of the attention among "
        "each other, and ∂m/∂(its own input) of the MLP, at the measured token. Each is certified "
        "by its own pullback, and both together are held to the block's. Costs about two Jacobians "
        "a block.",
        columns=(
            Column("attention_miscoupling", "rank layer layer", "m̃ among the attention halves"),
            Column("mlp_miscoupling", "rank layer layer", "m̃ among the MLP halves"),
            Column(
                "attention_coupling",
                "rank",
                "1 − mean m̃ among the attention halves of different layers",
            ),
            Column("mlp_coupling", "rank", "1 − mean m̃ among the MLP halves of different layers"),
            Column(
                "attention_singular_values", "layer max_rank", "the largest of ∂a/∂x, descending"
            ),
            Column(
                "mlp_singular_values",
                "layer max_rank",
                "the largest of ∂m/∂(its own input), descending",
            ),
            Column(
                "halves_certificate",
                "2 layer",
                "relative error of attention, then MLP, along one direction",
            ),
        ),
        run=prompt_by_prompt("halves", _measure),
        version=2,
        settings=("ranks", "method"),
        readings=tuple(
            ranked_reading(
                f"{half}_coupling", label, f"{half}_coupling", chance=chance_coupling, doc=doc
            )
            for half, label, doc in (
                (
                    "attention",
                    "coupling of the attention halves",
                    "Coupling that the attention layers have among each other.",
                ),
                (
                    "mlp",
                    "coupling of the MLP halves",
                    "Coupling that the MLPs have among each other.",
                ),
            )
        ),
        extra=lambda n_layers, position, settings: (2 * n_layers, 2 * n_layers),
    ),
)
