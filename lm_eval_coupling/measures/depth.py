"""Coupling of the blocks at one token: every J^l in the singular bases of every other block (paper, eqs. 8, 13, 14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.formulas.headline import (
    chance_coupling,
    coupling_of,
    mean_off_diagonal,
)
from lm_eval_coupling.measures.registry import (
    JACOBIAN,
    Column,
    Measure,
    MeasureResult,
    Reading,
    Record,
    column_reading,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measuring.batch import Batch, TracedPrompt
    from lm_eval_coupling.numerics.spectra import SingularTriplets

PAIRS = "rank layer layer"
AT_ONCE = (
    1 << 24
)  # entries of Jacobians that a device looks at together, with four times as many beside them


def run(batch: Batch) -> list[MeasureResult]:
    """Miscoupling of all pairs of blocks of every prompt, with the singular values it rests on."""
    from lm_eval_coupling.numerics.memory import prompts_at_once

    like, settings = batch.traces[0].resid_final, batch.settings
    at_once = prompts_at_once(
        len(batch.traces[0].calls), settings.ranks[-1], like.element_size(), like.device
    )
    return batch.measure_together(_of_prompts, "depth", at_once)


def _of_prompts(prompts: Sequence[TracedPrompt]) -> list[MeasureResult]:
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

    jacobians, each, ranks = (
        [one.jacobians for one in prompts],
        [one.triplets for one in prompts],
        prompts[0].settings.ranks,
    )
    triplets = SingularTriplets(
        *(stacked([getattr(one, name) for one in each]) for name in ("U", "S", "V", "residual"))
    )
    U, S, V = (part[..., : ranks[-1]] for part in (triplets.U, triplets.S, triplets.V))
    A = stacked([coupling_matrices(*one) for one in zip(jacobians, U, V, strict=True)])
    of_rank = at_ranks(A, numerical_rank(S)[:, None], ranks, lambda A: _miscouplings(A, S)) | {
        "subspace_overlap": torch.stack(
            [subspace_overlaps(basis, ranks) for basis in (U, V)], dim=2
        ),
        "gap": torch.stack([relative_gap(triplets.S, k) for k in ranks]),
        "angle_bound": torch.stack([angle_bound(triplets.S, triplets.residual, k) for k in ranks]),
    }
    columns = {name: values.transpose(0, 1) for name, values in of_rank.items()} | _own(
        jacobians, triplets
    )
    columns |= {"singular_values": S, "svd_residual": triplets.residual}
    return [
        MeasureResult(found | one.proof, undefined_pairs(found["normalized_miscoupling"][-1]))
        for one, found in zip(prompts, rows_on_host(columns), strict=True)
    ]


def _own(jacobians: Sequence[Tensor], triplets: SingularTriplets) -> dict[str, Tensor]:
    """What each Jacobian is like by itself; ``triplets`` are those of all prompts."""
    import torch

    device, norm, d_model = triplets.U.device, triplets.S[..., 0].double(), triplets.U.shape[-2]
    at_once = max(1, AT_ONCE // d_model**2) if device.type != "cpu" else 1
    parts = [
        part for J in jacobians for part in J.split(at_once)
    ]  # many Jacobians wait on the host
    found = [_of_part(part.to(device)) for part in parts]
    size, normality, symmetry = (torch.cat(some).view_as(norm) for some in zip(*found, strict=True))
    return {
        "jacobian_norm": norm,
        "jacobian_frobenius": size / math.sqrt(d_model),
        "stable_rank": (size / norm.masked_fill(norm == 0, torch.nan)) ** 2,
        "non_normality": normality,
        "symmetric_share": symmetry,
    }


def _of_part(J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, non-normality and symmetric share of each of some Jacobians."""
    from lm_eval_coupling.measures.formulas.normality import (
        frobenius,
        non_normality,
        symmetric_share,
    )

    size = frobenius(J)
    return size, non_normality(J, size), symmetric_share(J, size)


def _miscouplings(A: Tensor, S: Tensor) -> dict[str, Tensor]:
    """Every kind of miscoupling at the rank that the matrices were cut to."""
    from lm_eval_coupling.measures.formulas.miscoupling import (
        miscoupling,
        miscoupling_to,
        off_diagonal_norm,
    )

    S1, off = (
        S[..., None, : A.shape[-1]],
        off_diagonal_norm(A),
    )  # S1: broadcast over the layers of the bases
    return {
        "normalized_miscoupling": miscoupling(A, normalized=True, off=off),
        "miscoupling": miscoupling(A, off=off),
        "miscoupling_to": miscoupling_to(A, S1, off=off),
        "miscoupling_to_absolute": miscoupling_to(A, S1, absolute=True, off=off),
        "miscoupling_to_trace": miscoupling_to(A, S1, norm="trace", off=off),
    }


def undefined_pairs(normalized: np.ndarray, of: str = "") -> tuple[Reason, ...]:
    """How many layer pairs have no value at the largest rank, and why a shallow model has no coupling."""
    if len(normalized) == 1:
        words = "a model of one block has no pair of different layers, hence no coupling"
        return (Reason("one_layer", words),)
    undefined = int(np.isnan(normalized).sum())
    if not undefined:
        return ()
    words = f"{undefined} of {normalized.size} layer pairs{of} are undefined: a Jacobian is zero or of rank below K"
    return (Reason("zero_or_low_rank", words),)


def miscoupling_at(
    record: Record, rank: int, column: str = "normalized_miscoupling"
) -> np.ndarray | None:
    """A record's matrix [layer, layer'] of one kind of miscoupling at ``rank``; ``None`` where it was not measured."""
    pairs = record[column]
    return None if pairs is None else pairs[list(record["ranks"]).index(rank)]


def different_layers(record: Record, rank: int) -> np.ndarray:
    """m̃[layer, layer'] in float64 with NaN on the diagonal, which is 0 by definition."""
    measured = miscoupling_at(record, rank)
    assert measured is not None  # records without matrices have no layers to compare
    matrix = measured.astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _mean_of_layer(record: Record, rank: int, axis: int) -> np.ndarray:
    """1 − mean over the other layers of what is defined; NaN where nothing is."""
    matrix = different_layers(record, rank)
    n = np.isfinite(matrix).sum(axis=axis)
    return 1 - np.where(n, np.nansum(matrix, axis=axis) / np.maximum(n, 1), np.nan)


def coupling_at(
    record: Record, rank: int, column: str = "normalized_miscoupling", *, diagonal: bool = False
) -> float:
    """1 − mean of a record's normalised miscoupling of one kind; NaN where it was not measured."""
    matrix = miscoupling_at(record, rank, column)
    return np.nan if matrix is None else coupling_of(matrix, diagonal)


def _with_diagonal(record: Record, rank: int) -> float:
    return coupling_at(record, rank, diagonal=True)


def mean_of_pairs(column: str, label: str) -> Reading:
    """The mean of one kind of miscoupling over different layers."""

    def read(record: Record, rank: int) -> float:
        matrix = miscoupling_at(record, rank, column)
        return np.nan if matrix is None else mean_off_diagonal(matrix)

    return Reading(column, label, column, read, of_rank=True, sign=-1)


def _mean_of(column: str, label: str) -> Reading:
    """The mean over blocks of what is defined."""

    def read(record: Record, rank: int) -> float:
        values = record[column]
        known = () if values is None else values[np.isfinite(values)]
        return float(np.mean(known, dtype=np.float64)) if len(known) else np.nan

    return Reading(f"mean_{column}", f"{label}, mean", column, read)


def _middle_over_outer(record: Record, rank: int) -> float:
    """Mean σ_1 of the middle third of the blocks over that of the outer thirds; NaN with fewer than 3 blocks."""
    norms = record["jacobian_norm"]
    if norms is None or len(norms) < 3:
        return np.nan
    outer = len(norms) // 3
    middle, ends = norms[outer:-outer], np.concatenate([norms[:outer], norms[-outer:]])
    return (
        float(middle.mean(dtype=np.float64) / ends.mean(dtype=np.float64)) if ends.any() else np.nan
    )


_OWN = {
    "jacobian_norm": "‖J‖₂",
    "jacobian_frobenius": "‖J‖_F / √d",
    "stable_rank": "stable rank of the Jacobian",
    "non_normality": "non-normality of the Jacobian",
    "symmetric_share": "symmetric share of the Jacobian",
}


def _readings() -> Sequence[Reading]:
    m = "normalized_miscoupling"
    of_rank: dict[str, Any] = {"of_rank": True, "chance": chance_coupling, "sign": 1}
    jacobian, basis = (
        "coupling, its Jacobian in the others' bases",
        "coupling, the others' Jacobians in its basis",
    )
    return (
        Reading("coupling", "coupling", m, coupling_at, **of_rank),
        Reading(
            "coupling_with_diagonal",
            "coupling, with l = l'",
            m,
            _with_diagonal,
            of_rank=True,
            sign=1,
        ),
        Reading(
            "layer_coupling",
            jacobian,
            m,
            lambda r, k: _mean_of_layer(r, k, 1),
            over="block",
            **of_rank,
        ),
        Reading(
            "layer_coupling_as_basis",
            basis,
            m,
            lambda r, k: _mean_of_layer(r, k, 0),
            over="block",
            **of_rank,
        ),
        mean_of_pairs(m, "miscoupling m̃"),
        mean_of_pairs("miscoupling", "miscoupling m"),
        mean_of_pairs("miscoupling_to", "miscoupling m_K"),
        mean_of_pairs("miscoupling_to_absolute", "miscoupling m_K of |A|"),
        mean_of_pairs("miscoupling_to_trace", "miscoupling m_K by the trace"),
        *(column_reading(name, label, over="block") for name, label in _OWN.items()),
        *(_mean_of(name, label) for name, label in _OWN.items()),
        Reading(
            "middle_over_outer_norm",
            "‖J‖₂, middle third over outer thirds",
            "jacobian_norm",
            _middle_over_outer,
        ),
    )


MEASURES = (
    Measure(
        name="depth",
        doc="Coupling of all pairs of blocks at the measured token. A = U_{l'}ᵀ J^l V_{l'}; the first layer index of an "
        "array is the Jacobian's, the second that of the singular vectors.",
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
                "bound on the sine of the angle between the computed and the exact v_K and u_K, from residual and distance "
                "to the neighbouring singular values (Davis and Kahan); 1 where nothing is known",
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
        version=3,
        settings=("ranks", "method"),
        default=True,
        jacobians=True,
        readings=tuple(_readings()),
    ),
)
