"""Coupling of all pairs of blocks at one token (paper, eqs. 8, 13, 14)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.headline import (
    chance_coupling,
    chance_one_pair,
    chance_rotated,
    coupling_of,
    couplings_of,
    mean_off_diagonal,
)
from lm_eval_coupling.measures.registry import (
    JACOBIAN,
    Column,
    Measure,
    Reading,
    Record,
    column_reading,
    mean_reading,
    ranked_reading,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measures.contract import Batch, TracedPrompt
    from lm_eval_coupling.numerics.spectra import SingularTriplets

PAIRS = "rank layer layer"
# Entries of Jacobians on a device at a time; temporaries take four times as many.
AT_ONCE = 1 << 24


def run(batch: Batch) -> list[MeasureResult]:
    """Measure the miscoupling of all pairs of blocks, and the singular values it rests on."""
    from lm_eval_coupling.numerics.memory import prompts_at_once

    trace, rank = batch.traces[0], batch.settings.ranks[-1]
    at_once = prompts_at_once(
        len(trace.calls), rank, trace.resid_final.element_size(), trace.resid_final.device
    )
    return batch.measure_together(_measure, "depth", at_once)


def _measure(prompts: Sequence[TracedPrompt]) -> list[MeasureResult]:
    import torch

    from lm_eval_coupling.measures.formulas.miscoupling import (
        at_ranks,
        coupling_matrices,
        subspace_overlaps,
    )
    from lm_eval_coupling.numerics.spectra import (
        SingularTriplets,
        angle_bound,
        numerical_rank,
        relative_gap,
    )
    from lm_eval_coupling.numerics.transfer import rows_on_host, stacked

    ranks = prompts[0].settings.ranks
    jacobians = [prompt.jacobians for prompt in prompts]
    of_prompts = [prompt.triplets for prompt in prompts]
    triplets = SingularTriplets(
        *(
            stacked([getattr(triplets, name) for triplets in of_prompts])
            for name in ("U", "S", "V", "residual")
        )
    )
    U, S, V = (part[..., : ranks[-1]] for part in (triplets.U, triplets.S, triplets.V))
    A = stacked([coupling_matrices(*parts) for parts in zip(jacobians, U, V, strict=True)])
    by_rank = at_ranks(A, numerical_rank(S)[:, None], ranks, lambda A: _pair_columns(A, S)) | {
        "subspace_overlap": torch.stack(
            [subspace_overlaps(basis, ranks) for basis in (U, V)], dim=2
        ),
        "gap": torch.stack([relative_gap(triplets.S, k) for k in ranks]),
        "angle_bound": torch.stack([angle_bound(triplets.S, triplets.residual, k) for k in ranks]),
    }
    columns = {name: values.transpose(0, 1) for name, values in by_rank.items()}
    columns |= _jacobian_columns(jacobians, triplets)
    columns |= {"singular_values": S, "svd_residual": triplets.residual}
    rows = rows_on_host(columns)
    return [_result(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def _result(prompt: TracedPrompt, columns: dict[str, Any]) -> MeasureResult:
    columns |= {
        "rotated_coupling": couplings_of(columns["rotated"]),
        "mean_one_pair": [mean_off_diagonal(pairs) for pairs in columns["one_pair"]],
    }
    reasons = undefined_pairs(columns["normalized_miscoupling"][-1])
    if 1 in prompt.settings.ranks:
        words = "rotated and one_pair are undefined at K = 1: a 1 × 1 matrix has no other entry"
        reasons += (Reason("undefined", words),)
    return MeasureResult(columns | prompt.proof, reasons)


def _jacobian_columns(jacobians: Sequence[Tensor], triplets: SingularTriplets) -> dict[str, Tensor]:
    """Return size, rank and symmetry of each Jacobian; ``triplets`` are those of all prompts."""
    import torch

    device, norm, d_model = triplets.U.device, triplets.S[..., 0].double(), triplets.U.shape[-2]
    at_once = max(1, AT_ONCE // d_model**2) if device.type != "cpu" else 1
    # Jacobians may wait on the host: move a few at a time.
    rows = [_sizes(part.to(device)) for J in jacobians for part in J.split(at_once)]
    size, normality, symmetry = (
        torch.cat(parts).view_as(norm) for parts in zip(*rows, strict=True)
    )
    return {
        "jacobian_norm": norm,
        "jacobian_frobenius": size / math.sqrt(d_model),
        "stable_rank": (size / norm.masked_fill(norm == 0, torch.nan)) ** 2,
        "non_normality": normality,
        "symmetric_share": symmetry,
    }


def _sizes(J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖J‖_F, non-normality and symmetric share of each Jacobian."""
    from lm_eval_coupling.measures.formulas.normality import (
        frobenius,
        non_normality,
        symmetric_share,
    )

    size = frobenius(J)
    return size, non_normality(J, size), symmetric_share(J, size)


def _pair_columns(A: Tensor, S: Tensor) -> dict[str, Tensor]:
    """Return every number of a pair of blocks, for coupling matrices cut to one rank."""
    from lm_eval_coupling.measures.formulas.ablations import one_pair, rotated_miscoupling
    from lm_eval_coupling.measures.formulas.miscoupling import (
        miscoupling,
        miscoupling_to,
        off_diagonal_norm,
    )

    S1 = S[..., None, : A.shape[-1]]  # Broadcast over the layers of the bases.
    off = off_diagonal_norm(A)
    return {
        "normalized_miscoupling": miscoupling(A, normalized=True, off=off),
        "miscoupling": miscoupling(A, off=off),
        "miscoupling_to": miscoupling_to(A, S1, off=off),
        "miscoupling_to_absolute": miscoupling_to(A, S1, absolute=True, off=off),
        "miscoupling_to_trace": miscoupling_to(A, S1, norm="trace", off=off),
        "rotated": rotated_miscoupling(A, off=off),
        "one_pair": one_pair(A, off=off),
    }


def undefined_pairs(normalized: np.ndarray, of: str = "") -> tuple[Reason, ...]:
    """Return why layer pairs have no value: low rank, or a model of one block.

    Args:
        normalized: m̃ [layer, layer] at the largest rank.
        of: words after "layer pairs" that say which are meant.
    """
    if len(normalized) == 1:
        words = "a model of one block has no pair of different layers, hence no coupling"
        return (Reason("one_layer", words),)
    undefined = int(np.isnan(normalized).sum())
    if not undefined:
        return ()
    words = (
        f"{undefined} of {normalized.size} layer pairs{of} are undefined: "
        "a Jacobian is zero or of too low a rank"
    )
    return (Reason("zero_or_low_rank", words),)


def miscoupling_at(
    record: Record, rank: int, column: str = "normalized_miscoupling"
) -> np.ndarray | None:
    """Return one kind of miscoupling [layer, layer] at ``rank``; None if it was not measured."""
    pairs = record[column]
    return None if pairs is None else pairs[list(record["ranks"]).index(rank)]


def different_layers(record: Record, rank: int) -> np.ndarray:
    """Return m̃ [layer, layer] in float64 with NaN on the diagonal, which is 0 by definition."""
    pairs = miscoupling_at(record, rank)
    assert pairs is not None  # Records without matrices have no layers to compare.
    matrix = pairs.astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _layer_coupling(record: Record, rank: int, axis: int) -> np.ndarray:
    """Return 1 − mean of the defined m̃ over the other layers; NaN where there are none."""
    matrix = different_layers(record, rank)
    n = np.isfinite(matrix).sum(axis=axis)
    return 1 - np.where(n, np.nansum(matrix, axis=axis) / np.maximum(n, 1), np.nan)


def coupling_at(
    record: Record, rank: int, column: str = "normalized_miscoupling", *, diagonal: bool = False
) -> float:
    """Return 1 − mean of one normalized miscoupling; NaN where it was not measured."""
    matrix = miscoupling_at(record, rank, column)
    return np.nan if matrix is None else coupling_of(matrix, diagonal)


def mean_of_pairs(column: str, label: str) -> Reading:
    """Return the reading of one miscoupling's mean over different layers."""

    def read(record: Record, rank: int) -> float:
        matrix = miscoupling_at(record, rank, column)
        return np.nan if matrix is None else mean_off_diagonal(matrix)

    return Reading(column, label, column, read, of_rank=True, sign=-1)


def _middle_over_outer(norms: np.ndarray) -> float:
    """Return mean σ_1 of the middle third of the blocks over that of the outer thirds.

    It is NaN for fewer than 3 blocks, and where the outer blocks are zero.
    """
    outer = len(norms) // 3
    if not outer:
        return np.nan
    middle, ends = norms[outer:-outer], np.concatenate([norms[:outer], norms[-outer:]])
    return float(middle.mean() / ends.mean()) if ends.any() else np.nan


_JACOBIAN_LABELS = {
    "jacobian_norm": "‖J‖₂",
    "jacobian_frobenius": "‖J‖_F / √d",
    "stable_rank": "stable rank of the Jacobian",
    "non_normality": "non-normality of the Jacobian",
    "symmetric_share": "symmetric share of the Jacobian",
}


_coupling: Callable[..., Reading] = functools.partial(
    Reading, column="normalized_miscoupling", of_rank=True, sign=1
)
_at_chance = functools.partial(_coupling, chance=chance_coupling)
_READINGS = (
    _at_chance(
        "coupling",
        "coupling",
        read=coupling_at,
        doc="How well the singular vectors of one block diagonalize the Jacobian of another: "
        "1 for blocks that act along the same directions.",
    ),
    _coupling(
        "coupling_with_diagonal",
        "coupling, with l = l'",
        read=functools.partial(coupling_at, diagonal=True),
        doc="Coupling with the pairs of a block and itself, which are 1 by definition.",
    ),
    _at_chance(
        "layer_coupling",
        "coupling, its Jacobian in the others' bases",
        read=functools.partial(_layer_coupling, axis=1),
        over="block",
        doc="How well the other blocks' singular vectors diagonalize this block's Jacobian.",
    ),
    _at_chance(
        "layer_coupling_as_basis",
        "coupling, the others' Jacobians in its basis",
        read=functools.partial(_layer_coupling, axis=0),
        over="block",
        doc="How well this block's singular vectors diagonalize the other blocks' Jacobians.",
    ),
    ranked_reading(
        "rotated",
        "coupling, bases rotated alike",
        "rotated_coupling",
        chance=chance_rotated,
        doc="Coupling that survives when both bases are turned by the same random rotation: "
        "the part that rests on shared subspaces, not on matched single vectors. It is about "
        "three quarters of SmolLM2-135M's coupling above chance.",
    ),
    ranked_reading(
        "one_pair",
        "share of the first pair",
        "mean_one_pair",
        chance=chance_one_pair,
        doc="Share of the first pair of singular vectors in what one block does in the basis "
        "of another: large where all blocks share one strong direction.",
    ),
    mean_of_pairs("normalized_miscoupling", "miscoupling m̃"),
    mean_of_pairs("miscoupling", "miscoupling m"),
    mean_of_pairs("miscoupling_to", "miscoupling m_K"),
    mean_of_pairs("miscoupling_to_absolute", "miscoupling m_K of |A|"),
    mean_of_pairs("miscoupling_to_trace", "miscoupling m_K by the trace"),
    *(column_reading(name, label, over="block") for name, label in _JACOBIAN_LABELS.items()),
    *(
        mean_reading(f"mean_{name}", f"{label}, mean", name)
        for name, label in _JACOBIAN_LABELS.items()
    ),
    mean_reading(
        "middle_over_outer_norm",
        "‖J‖₂, middle third over outer thirds",
        "jacobian_norm",
        _middle_over_outer,
    ),
)

MEASURES = (
    Measure(
        name="depth",
        doc="Coupling of all pairs of blocks at the measured token. A = U_{l'}ᵀ J^l V_{l'}; the "
        "first layer index of an array is the Jacobian's, the second that of the singular vectors. "
        "`rotated` and `one_pair` say what a coupling is made of: how much of it remains when "
        "single vectors are mixed within their subspaces, and how much is the first pair alone.",
        columns=(
            Column("normalized_miscoupling", PAIRS, "m̃ = ‖A − Diag A‖_F / ‖A‖_F (paper, eq. 14)"),
            Column("miscoupling", PAIRS, "m = ‖A − Diag A‖_F (paper, eq. 13)"),
            Column(
                "miscoupling_to",
                PAIRS,
                "m_K = ‖A − S‖_F / ‖S‖_2, S the top K singular values of J^l (project page)",
            ),
            Column(
                "miscoupling_to_absolute", PAIRS, "m_K with |A| entrywise (the authors' release)"
            ),
            Column(
                "miscoupling_to_trace",
                PAIRS,
                "m_K divided by the sum of S instead (the authors' release)",
            ),
            Column(
                "rotated",
                PAIRS,
                "m̃ expected after one random rotation Q of both bases, root of the mean square: "
                "√(1 − (2‖sym A‖_F² + (tr A)²) / ((K + 2)‖A‖_F²)). It depends on the subspaces "
                "and on the map u_k ↔ v_k between them, and needs no match of single vectors",
            ),
            Column(
                "rotated_coupling",
                "rank",
                "1 − mean `rotated` over different layers: what of the coupling needs no match of "
                "single vectors",
            ),
            Column("one_pair", PAIRS, "A₁₁² / ‖A‖_F²: the share of the first pair of vectors"),
            Column(
                "mean_one_pair",
                "rank",
                "mean `one_pair` over different layers: large where all blocks share one direction",
            ),
            Column(
                "subspace_overlap",
                "rank 2 layer layer",
                "‖U_{l'}ᵀ U_l‖_F² / K, then the same of V: free of rotations",
            ),
            Column("singular_values", "layer max_rank", "the largest of J^l, descending"),
            Column("gap", "rank layer", "(σ_K − σ_{K+1}) / σ_K: where it is small, m may jump"),
            Column(
                "svd_residual",
                "layer",
                "max over the triplets of ‖Jv − σu‖ and ‖Jᵀu − σv‖, over σ_1",
            ),
            Column(
                "angle_bound",
                "rank layer",
                "bound on the sine of the angle between the computed and the exact v_K and u_K, "
                "from residual and distance to the neighboring singular values (Davis and Kahan); "
                "1 where nothing is known",
            ),
            Column("jacobian_norm", "layer", "‖J^l‖_2 = σ_1"),
            Column("jacobian_frobenius", "layer", "‖J^l‖_F / √d_model"),
            Column("stable_rank", "layer", "‖J^l‖_F² / ‖J^l‖_2²"),
            Column(
                "non_normality",
                "layer",
                "‖JJᵀ − JᵀJ‖_F / ‖J‖_F²: 0 for a normal matrix (arXiv 2605.14258)",
            ),
            Column(
                "symmetric_share",
                "layer",
                "‖(J + Jᵀ)/2‖_F / ‖J‖_F: 1/√2 for a random matrix (arXiv 2605.14258)",
            ),
            *JACOBIAN,
        ),
        run=run,
        version=4,
        settings=("ranks", "method"),
        default=True,
        jacobians=True,
        readings=_READINGS,
    ),
)
