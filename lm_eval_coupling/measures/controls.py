"""Controls of coupling: what is left of it without one shared direction, or without a common c·I.

`rotated` and `one_pair` cost nothing beside the coupling and belong to the measure ``depth``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.depth import PAIRS, undefined_pairs
from lm_eval_coupling.measures.formulas.headline import (
    chance_coupling,
    couplings_of,
    mean_off_diagonal,
)
from lm_eval_coupling.measures.registry import (
    JACOBIAN,
    Column,
    Measure,
    column_reading,
    mean_reading,
    prompt_by_prompt,
    ranked_reading,
)

if TYPE_CHECKING:
    from lm_eval_coupling.measures.contract import TracedPrompt


def _measure(prompt: TracedPrompt) -> MeasureResult:
    """Measure the controls that follow from the Jacobians and triplets of the coupling."""
    from lm_eval_coupling.measures.formulas import ablations
    from lm_eval_coupling.measures.formulas.miscoupling import (
        at_ranks,
        coupling_matrices,
    )
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.spectra import numerical_rank
    from lm_eval_coupling.numerics.transfer import on_host

    ranks, J, triplets = prompt.settings.ranks, prompt.jacobians, prompt.triplets
    A = coupling_matrices(J, triplets.U, triplets.V)
    pairs = at_ranks(
        A,
        numerical_rank(triplets.S),
        ranks,
        lambda A: {
            "negative_share": ablations.negative_share(A),
            "signed_coupling": ablations.signed_coupling(A),
        },
    )
    pairs["deflated"] = ablations.deflated_miscoupling(A, triplets, ranks)
    columns: dict[str, Any] = {name: on_host(values) for name, values in pairs.items()}
    columns["deflated_coupling"] = couplings_of(columns["deflated"])
    for name in ("negative_share", "signed_coupling"):
        columns[f"mean_{name}"] = [mean_off_diagonal(matrix) for matrix in columns[name]]
    cosines = on_host(ablations.singular_cosines(triplets)[:, : ranks[-1]])
    columns |= {
        "erasing": cosines,
        "mean_erasing": [_mean_of_full_rank(cosines[:, :k]) for k in ranks],
        "trace_share": on_host(ablations.trace_share(off_mps(J))),
    }
    without = " without the largest singular triplet"
    reasons = _reasons(columns["deflated"], ranks, without, d_model=J.shape[-1])
    return MeasureResult(columns | prompt.proof, reasons)


def _mean_of_full_rank(cosines: np.ndarray) -> float:
    """Return the mean over the blocks whose K cosines are all defined; NaN without such a block."""
    defined = cosines[np.isfinite(cosines).all(axis=1)]
    return float(defined.mean(dtype=np.float64)) if len(defined) else np.nan


def _reasons(
    pairs: np.ndarray, ranks: tuple[int, ...], without: str, d_model: int | None = None
) -> tuple[Reason, ...]:
    """Return why values of layer pairs are undefined: K = 1, K = d_model, low rank, or one block.

    Args:
        pairs: m̃ of one control [rank, layer, layer].
        ranks: numbers K of singular vectors, ascending.
        without: words after "layer pairs" that say what the control has removed.
        d_model: width of the stream, of a control that needs K + 1 singular vectors.
    """
    reasons = []
    if 1 in ranks:
        words = "controls of layer pairs are undefined at K = 1: a 1 × 1 matrix has no other entry"
        reasons.append(Reason("undefined", words))
    if ranks[-1] == d_model:
        words = f"deflated is undefined at K = d_model = {d_model}: it needs K + 1 singular vectors"
        reasons.append(Reason("undefined", words))
    elif ranks[-1] > 1 or len(pairs[-1]) == 1:
        reasons += undefined_pairs(pairs[-1], without)
    return tuple(reasons)


def _measure_without_identity(prompt: TracedPrompt) -> MeasureResult:
    """Measure the coupling of J − (tr J / d) I, in singular bases of its own."""
    from lm_eval_coupling.measures.formulas.ablations import paired_miscoupling, without_identity
    from lm_eval_coupling.measures.formulas.miscoupling import at_ranks, coupling_matrices
    from lm_eval_coupling.numerics.spectra import numerical_rank, top_singular
    from lm_eval_coupling.numerics.transfer import on_host

    ranks = prompt.settings.ranks
    J = without_identity(prompt.jacobians)
    triplets = top_singular(J, ranks[-1], device=prompt.triplets.U.device)
    A = coupling_matrices(J, triplets.U, triplets.V)
    rank = numerical_rank(triplets.S)
    pairs = on_host(at_ranks(A, rank, ranks, lambda A: {"m": paired_miscoupling(A)})["m"])
    columns = {
        "without_identity": pairs,
        "without_identity_coupling": couplings_of(pairs),
        "without_identity_singular_values": triplets.S,
    }
    reasons = _reasons(pairs, ranks, " without the multiple of the identity")
    return MeasureResult(columns | prompt.proof, reasons)


MEASURES = (
    Measure(
        name="controls",
        doc="What coupling is made of, from the same Jacobians and singular vectors; `depth` "
        "records two further controls, `rotated` and `one_pair`. `deflated` is the coupling that "
        "remains when every Jacobian loses its largest singular triplet: it tells one direction "
        "that all blocks share from coupling of many. Coupling does not see signs; these do: "
        "`erasing` and `trace_share` are negative where a block shrinks what is there along its "
        "strongest directions, and `signed_coupling` is negative where two blocks do the opposite "
        "of each other.",
        columns=(
            Column(
                "deflated",
                PAIRS,
                "m̃ of J^l − σ₁u₁v₁ᵀ in the singular vectors 2 … K + 1 of block l'",
            ),
            Column("deflated_coupling", "rank", "1 − mean `deflated` over different layers"),
            Column(
                "negative_share",
                PAIRS,
                "share of negative entries on the diagonal of A: pairs u_k, v_k of block l' "
                "between which block l has the opposite sign",
            ),
            Column(
                "mean_negative_share",
                "rank",
                "mean `negative_share` over different layers: 1/2 for unrelated layers",
            ),
            Column(
                "signed_coupling",
                PAIRS,
                "tr A / (√K ‖A‖_F): 1 where block l does the same as block l' up to a factor, −1 "
                "where it does the opposite",
            ),
            Column("mean_signed_coupling", "rank", "mean `signed_coupling` over different layers"),
            Column(
                "erasing",
                "layer max_rank",
                "cos(u_k, v_k): −1 where a block erases what it finds along v_k, 1 where it adds",
            ),
            Column("mean_erasing", "rank", "mean `erasing` over blocks and the top K"),
            Column(
                "trace_share",
                "layer",
                "tr J^l / (√d_model ‖J^l‖_F): ±1 for a multiple of the identity, near 0 for a "
                "random matrix",
            ),
            *JACOBIAN,
        ),
        run=prompt_by_prompt("controls", _measure),
        settings=("ranks", "method"),
        jacobians=True,
        readings=(
            ranked_reading(
                "deflated",
                "coupling, first pairs removed",
                "deflated_coupling",
                chance=chance_coupling,
                doc="Coupling without each block's strongest direction. Where it is near chance, "
                "the coupling was one direction that all blocks share.",
            ),
            ranked_reading(
                "negative_share",
                "share of negative diagonal entries",
                "mean_negative_share",
                chance=lambda rank: 0.5,
                doc="How often one block reverses what another does between a pair of singular "
                "vectors.",
            ),
            ranked_reading(
                "signed_coupling",
                "signed coupling",
                "mean_signed_coupling",
                chance=lambda rank: 0.0,
                doc="Positive where blocks do the same along shared directions, negative where "
                "they do the opposite.",
            ),
            ranked_reading(
                "erasing",
                "cos(u, v), mean of the top K",
                "mean_erasing",
                chance=lambda rank: 0.0,
                doc="Negative where blocks erase what is there along their strongest directions, "
                "positive where they add to it.",
            ),
            column_reading(
                "trace_share",
                "trace share of the Jacobian",
                over="block",
                doc="Negative where a block shrinks the stream evenly, 0 for a random block.",
            ),
            mean_reading(
                "mean_trace_share",
                "trace share of the Jacobian, mean",
                "trace_share",
                doc="Negative where blocks shrink the stream evenly.",
            ),
        ),
    ),
    Measure(
        name="without_identity",
        doc="Coupling without the identity part: of J − (tr J / d_model) I for every block, in "
        "singular vectors of its own. Blocks that all shrink the stream alike are coupled by a "
        "common −c·I, and this number says how much coupling there is besides. Costs one more "
        "decomposition of each Jacobian.",
        columns=(
            Column(
                "without_identity",
                PAIRS,
                "m̃ among J^l − (tr J^l / d_model) I, with their own singular vectors",
            ),
            Column(
                "without_identity_coupling",
                "rank",
                "1 − mean `without_identity` over different layers",
            ),
            Column(
                "without_identity_singular_values",
                "layer max_rank",
                "the largest of J^l − (tr J^l / d_model) I, descending",
            ),
            *JACOBIAN,
        ),
        run=prompt_by_prompt("without_identity", _measure_without_identity),
        settings=("ranks", "method"),
        jacobians=True,
        readings=(
            ranked_reading(
                "without_identity",
                "coupling, identity part removed",
                "without_identity_coupling",
                chance=chance_coupling,
                doc="Coupling without what every direction has in common. The difference from "
                "`coupling` is due to blocks that all shrink, or all grow, the stream evenly.",
            ),
        ),
        # A changed copy of each Jacobian.
        extra=lambda n_layers, position, settings: (n_layers, n_layers),
    ),
)
