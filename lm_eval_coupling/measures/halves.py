"""Which half of a block is coupled: the attention's Jacobians among each other, and the MLPs'."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lm_eval_coupling.errors import Reason, Unmeasurable
from lm_eval_coupling.measures.depth import undefined_pairs
from lm_eval_coupling.measures.formulas.headline import chance_coupling, couplings_of
from lm_eval_coupling.measures.registry import Column, Measure, MeasureResult, Reading, Record

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.jacobians.protocol import Call
    from lm_eval_coupling.measuring.batch import Batch, TracedPrompt

HALVES = ("attention", "mlp")
_SLACK = 10  # tolerances of one Jacobian that two of them and a product may be off the whole


def run(batch: Batch) -> list[MeasureResult]:
    """m̃ among the halves of all blocks of every prompt."""
    return batch.measure_each(_of_prompt, "halves")


def _of_prompt(one: TracedPrompt) -> MeasureResult:
    import torch

    from lm_eval_coupling.measures.formulas.miscoupling import normalized_by_rank
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.spectra import top_singular
    from lm_eval_coupling.numerics.transfer import on_host

    ranks = one.settings.ranks
    found = [_of_block(one, call) for call in one.trace.calls]
    columns: dict[str, object] = {
        "halves_certificate": [[errors[i] for _, errors in found] for i in range(len(HALVES))]
    }
    reasons: list[Reason] = []
    for i, half in enumerate(HALVES):
        J = torch.stack([jacobians[i].to(one.trace.resid_final.device) for jacobians, _ in found])
        J = off_mps(J)
        triplets = top_singular(J, ranks[-1])
        pairs = on_host(normalized_by_rank(J, triplets, ranks))
        columns |= {f"{half}_miscoupling": pairs, f"{half}_singular_values": triplets.S}
        columns[f"{half}_coupling"] = couplings_of(pairs)
        reasons += undefined_pairs(pairs[-1], f" of the {half} halves")
    return MeasureResult(columns, tuple(reasons))


def _of_block(one: TracedPrompt, call: Call) -> tuple[list[Tensor], list[float]]:
    """J of attention and MLP at the measured token, and their certificates."""
    from lm_eval_coupling.jacobians.certify import TOLERANCE
    from lm_eval_coupling.jacobians.levels import certified_jacobian

    at, method = one.position, one.settings.method
    jacobians, errors = [], []
    for half, alone in zip(HALVES, (one.attention_alone(call), one.mlp_alone(call)), strict=True):
        with alone as part:
            made = certified_jacobian(part, at, at, method)
        if not made.error <= TOLERANCE[call.dtype]:
            words = f"the Jacobian of the {half} half of block {call.layer} ({made.level}) is off by {made.error:.1e}"
            raise Unmeasurable(
                "certificate", f"{words}, expected at most {TOLERANCE[call.dtype]:.0e}"
            )
        jacobians.append(made.jacobian)
        errors.append(made.error)
    _require_whole(call, jacobians, at)
    return jacobians, errors


def _require_whole(call: Call, jacobians: list[Tensor], at: int) -> None:
    """Both halves make the block: one after the other, or side by side."""
    from lm_eval_coupling.jacobians.certify import TOLERANCE, probe, pulled_back

    attention, mlp = jacobians
    u = probe(call.layer, call.resid_pre)
    with call.ready():
        whole = pulled_back(call, at, at) - u
    side_by_side = u @ attention + u @ mlp
    in_turn = side_by_side + (u @ mlp) @ attention
    error = min(float((whole - parts).norm()) for parts in (side_by_side, in_turn))
    allowed = _SLACK * TOLERANCE[call.dtype] * float(u.norm() + whole.norm())
    if not error <= allowed:
        raise Unmeasurable(
            "refused", f"attention and MLP do not add up to block {call.layer}: off by {error:.1e}"
        )


def _reading(half: str, label: str) -> Reading:
    column = f"{half}_coupling"

    def read(record: Record, rank: int) -> float:
        found = record[column]
        return math.nan if found is None else float(found[list(record["ranks"]).index(rank)])

    return Reading(column, label, column, read, of_rank=True, chance=chance_coupling)


MEASURES = (
    Measure(
        name="halves",
        doc="Coupling of the blocks' halves, f = a + m: the Jacobians ∂a/∂x of the attention among each other, and ∂m/∂(its "
        "own input) of the MLP, at the measured token. Each is certified by its own pullback, and both together are held to "
        "the block's. Costs about two Jacobians a block.",
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
        run=run,
        version=2,
        settings=("ranks", "method"),
        readings=(
            _reading("attention", "coupling of the attention halves"),
            _reading("mlp", "coupling of the MLP halves"),
        ),
        extra=lambda n_layers, position, settings: (2 * n_layers, 2 * n_layers),
    ),
)
