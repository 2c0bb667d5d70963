"""What a block does to the stream, and how the states of the prompt's tokens lie, without any Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.registry import (
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

_FEWEST = 3  # tokens, from which on there is a curvature


def run(batch: Batch) -> list[MeasureResult]:
    """Geometry of the stream of every prompt."""
    return batch.measure_each(_of_prompt, "geometry")


def _of_prompt(one: TracedPrompt) -> MeasureResult:
    from lm_eval_coupling.measures.formulas import token_states as maths

    x = one.trajectory
    columns: dict[str, Any] = {
        "block_influence": maths.block_influence(x),
        "relative_contribution": maths.relative_contribution(x),
        "contribution_cosine": maths.contribution_cosine(x),
        "massive_activation": maths.massive_activation(x),
    }
    if len(one.tokens) < _FEWEST:
        words = f"no geometry of the tokens' states: the prompt has {len(one.tokens)}, at least {_FEWEST} are needed"
        return MeasureResult(columns, (Reason("too_short", words),))
    columns |= _of_states(one)
    undefined = [name for name, value in columns.items() if bool(value.isnan().any())]
    words = f"undefined {', '.join(undefined)}: a state, a step or their spread is zero"
    return MeasureResult(columns, (Reason("undefined", words),) if undefined else ())


def _of_states(one: TracedPrompt) -> dict[str, Tensor]:
    """Numbers of the states of all tokens, one depth at a time."""
    import torch

    from lm_eval_coupling.measures.formulas import token_states as maths
    from lm_eval_coupling.numerics.devices import off_mps

    # Blocks may lie on several devices.
    stream = [call.resid_pre[0].to(one.trace.resid_final.device) for call in one.trace.calls]
    stream.append(one.trace.resid_final[0])
    rows: dict[str, list[Tensor]] = {}
    before = None
    for state in stream:
        states = maths.States(off_mps(state))
        shares = states.spectrum()
        found = {
            "state_entropy": maths.entropy_of(shares),
            "state_effective_rank": maths.entropy_of(shares).exp(),
            "state_effective_rank_centred": maths.entropy_of(states.spectrum_normalised()).exp(),
            "anisotropy": shares[-1],
            "token_curvature": maths.token_curvature(states.X),
        }
        if before is not None:
            found["linearity"] = maths.procrustes_similarity(before, states)
            found["linearity_of_update"] = maths.procrustes_similarity(before, states.minus(before))
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
        before = states
    last = {"matrix_nuclear_norm": maths.matrix_nuclear_norm(states.X)}
    # Read from the device when all are there.
    return {name: torch.stack(values).cpu() for name, values in rows.items()} | {
        n: v.cpu() for n, v in last.items()
    }


def _summary(name: str, label: str, column: str, take: Any) -> Reading:
    """One number of a prompt, of what a column has for every depth."""

    def read(record: Record, rank: int) -> float:
        values = record[column]
        return np.nan if values is None else float(take(np.asarray(values, np.float64)))

    return Reading(name, label, column, read)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _drop(values: np.ndarray) -> float:
    """From the embeddings to the middle of the blocks."""
    return values[0] - values[len(values) // 2]


def _readings() -> Sequence[Reading]:
    of_blocks = {
        "block_influence": "block influence",
        "relative_contribution": "‖f‖ / ‖x‖",
        "contribution_cosine": "cos(f, x)",
        "linearity": "linearity",
        "linearity_of_update": "linearity of the update",
    }
    of_points = {
        "state_entropy": "entropy of the token states (nats)",
        "state_effective_rank": "effective rank of the token states",
        "state_effective_rank_centred": "effective rank of the token states, centred and normalised",
        "anisotropy": "anisotropy of the token states",
        "massive_activation": "max / median of |x|",
        "token_curvature": "curvature over tokens (radians)",
    }
    drawn = [column_reading(name, label, over="block") for name, label in of_blocks.items()]
    drawn += [
        column_reading(name, label, over="point", log=name == "massive_activation")
        for name, label in of_points.items()
    ]
    means = [
        _summary(f"mean_{name}", f"{label}, mean", name, _mean)
        for name, label in (of_blocks | of_points).items()
    ]
    return (
        *drawn,
        *means,
        _summary(
            "last_state_effective_rank",
            "effective rank of the last states",
            "state_effective_rank",
            lambda v: v[-1],
        ),
        _summary(
            "last_state_effective_rank_centred",
            "effective rank of the last states, centred and normalised",
            "state_effective_rank_centred",
            lambda v: v[-1],
        ),
        _summary("curvature_drop", "drop of the curvature to the middle", "token_curvature", _drop),
        column_reading("matrix_nuclear_norm", "matrix nuclear norm of the last states"),
    )


MEASURES = (
    Measure(
        name="geometry",
        doc="How the blocks move the stream at the measured token, and how the states X^l of all tokens of the prompt lie. "
        "No Jacobian: two products and five eigendecompositions of size min(T, d) for T tokens at every depth. "
        "Prompts of fewer than 3 tokens have the first part only.",
        columns=(
            Column(
                "block_influence", "layer", "1 − cos(x^{l−1}, x^l) (ShortGPT, arXiv 2403.03853)"
            ),
            Column("relative_contribution", "layer", "‖f^l‖ / ‖x^{l−1}‖ (arXiv 2505.13898)"),
            Column("contribution_cosine", "layer", "cos(f^l, x^{l−1}) (arXiv 2512.14064)"),
            Column(
                "massive_activation",
                "layer+1",
                "max / median of |x_i^l| over coordinates (arXiv 2603.06248)",
            ),
            Column(
                "state_entropy",
                "layer+1",
                "−Σ p log p in nats, p the shares of the eigenvalues of X^l X^lᵀ, rows as they are (arXiv 2502.02013)",
            ),
            Column(
                "state_effective_rank",
                "layer+1",
                "e to that power (Roy and Vetterli, 2007; RankMe, arXiv 2210.02885)",
            ),
            Column(
                "state_effective_rank_centred",
                "layer+1",
                "the same of rows less their mean, each then of norm 1 (Diff-eRank, arXiv 2401.17139)",
            ),
            Column(
                "anisotropy", "layer+1", "σ_1² / Σσ² of X^l, rows as they are (arXiv 2405.12250)"
            ),
            Column(
                "token_curvature",
                "layer+1",
                "mean angle in radians between successive differences of token states (arXiv 2311.04930)",
            ),
            Column(
                "linearity",
                "layer",
                "1 − min ‖s X^{l−1} Q − X^l‖² over scales s and orthogonal Q, both centred and of norm 1: Procrustes "
                "similarity (after arXiv 2405.12250, whose free linear map fits anything of fewer tokens than dimensions)",
            ),
            Column(
                "linearity_of_update",
                "layer",
                "the same of X^{l−1} and X^l − X^{l−1}, without the skip",
            ),
            Column(
                "matrix_nuclear_norm",
                "",
                "sum of the min(T, d) largest column norms of X^L with rows of norm 1, over T (arXiv 2410.10672)",
            ),
        ),
        run=run,
        readings=tuple(_readings()),
    ),
)
