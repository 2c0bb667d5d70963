"""Swapped order of the authors' release ("vju"): m_K of V_{l'}ᵀ J^l U_{l'}."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.depth import PAIRS, mean_of_pairs
from lm_eval_coupling.measures.registry import JACOBIAN, Column, Measure, prompt_by_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measures.contract import TracedPrompt


def _measure(prompt: TracedPrompt) -> MeasureResult:
    """Measure m_K of all pairs of blocks with U and V exchanged."""
    from lm_eval_coupling.measures.formulas.miscoupling import (
        at_ranks,
        coupling_matrices,
        miscoupling_to,
        off_diagonal_norm,
    )
    from lm_eval_coupling.numerics.spectra import numerical_rank

    ranks, triplets = prompt.settings.ranks, prompt.triplets
    U, S, V = (part[..., : ranks[-1]] for part in (triplets.U, triplets.S, triplets.V))

    def pair_columns(A: Tensor) -> dict[str, Tensor]:
        S1, off = S[:, None, : A.shape[-1]], off_diagonal_norm(A)
        return {
            "miscoupling_to_vju": miscoupling_to(A, S1, off=off),
            "miscoupling_to_absolute_vju": miscoupling_to(A, S1, absolute=True, off=off),
        }

    A = coupling_matrices(prompt.jacobians, V, U)
    columns = at_ranks(A, numerical_rank(S), ranks, pair_columns)
    return MeasureResult(columns | prompt.proof)


MEASURES = (
    Measure(
        name="swapped",
        doc="m_K with left and right singular vectors exchanged, A = V_{l'}ᵀ J^l U_{l'} "
        '("vju" in the authors\' release).',
        columns=(
            Column("miscoupling_to_vju", PAIRS, "m_K of V_{l'}ᵀ J^l U_{l'}"),
            Column("miscoupling_to_absolute_vju", PAIRS, "the same with |A| entrywise"),
            *JACOBIAN,
        ),
        run=prompt_by_prompt("swapped", _measure),
        version=2,
        settings=("ranks", "method"),
        jacobians=True,
        readings=(
            mean_of_pairs("miscoupling_to_vju", "miscoupling m_K, U and V swapped"),
            mean_of_pairs("miscoupling_to_absolute_vju", "miscoupling m_K of |A|, U and V swapped"),
        ),
    ),
)
