"""Geometry of the stream without Jacobians: steps of the blocks, states of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.registry import (
    Column,
    Measure,
    column_reading,
    mean_reading,
    prompt_by_prompt,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measures.contract import TracedPrompt

_FEWEST_TOKENS = 3  # A curvature takes two differences of states.


def _measure(prompt: TracedPrompt) -> MeasureResult:
    from lm_eval_coupling.measures.formulas import token_states as formulas

    x = prompt.trajectory
    columns: dict[str, Any] = {
        "block_influence": formulas.block_influence(x),
        "relative_contribution": formulas.relative_contribution(x),
        "contribution_cosine": formulas.contribution_cosine(x),
        "massive_activation": formulas.massive_activation(x),
    }
    if len(prompt.tokens) < _FEWEST_TOKENS:
        words = (
            f"no geometry of the tokens' states: the prompt has {len(prompt.tokens)}, "
            f"at least {_FEWEST_TOKENS} are needed"
        )
        return MeasureResult(columns, (Reason("too_short", words),))
    columns |= _state_columns(prompt)
    undefined = [name for name, value in columns.items() if bool(value.isnan().any())]
    words = f"undefined {', '.join(undefined)}: a state, a step or their spread is zero"
    return MeasureResult(columns, (Reason("undefined", words),) if undefined else ())


def _state_columns(prompt: TracedPrompt) -> dict[str, Tensor]:
    """Return the numbers of the states of all tokens, computed one depth at a time."""
    import torch

    from lm_eval_coupling.measures.formulas import token_states as formulas
    from lm_eval_coupling.numerics.devices import off_mps

    # Blocks may lie on several devices.
    trace = prompt.trace
    stream = [call.resid_pre[0].to(trace.resid_final.device) for call in trace.calls]
    stream.append(trace.resid_final[0])
    rows: dict[str, list[Tensor]] = {}
    before = None
    for state in stream:
        states = formulas.States(off_mps(state))
        shares = states.spectrum()
        values = {
            "state_entropy": formulas.entropy_of(shares),
            "state_effective_rank": formulas.entropy_of(shares).exp(),
            "state_effective_rank_centred": formulas.entropy_of(states.spectrum_normalized()).exp(),
            "anisotropy": shares[-1],
            "token_curvature": formulas.token_curvature(states.X),
        }
        if before is not None:
            update = states.minus(before)
            values["linearity"] = formulas.procrustes_similarity(before, states)
            values["linearity_of_update"] = formulas.procrustes_similarity(before, update)
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
        before = states
    nuclear = formulas.matrix_nuclear_norm(states.X).cpu()
    # One transfer from the device for each column, after all depths.
    columns = {name: torch.stack(values).cpu() for name, values in rows.items()}
    return columns | {"matrix_nuclear_norm": nuclear}


_BLOCK_LABELS = {
    "block_influence": "block influence",
    "relative_contribution": "‖f‖ / ‖x‖",
    "contribution_cosine": "cos(f, x)",
    "linearity": "linearity",
    "linearity_of_update": "linearity of the update",
}
_POINT_LABELS = {
    "state_entropy": "entropy of the token states (nats)",
    "state_effective_rank": "effective rank of the token states",
    "state_effective_rank_centred": "effective rank of the token states, centered and normalized",
    "anisotropy": "anisotropy of the token states",
    "massive_activation": "max / median of |x|",
    "token_curvature": "curvature over tokens (radians)",
}


_READINGS = (
    *(column_reading(name, label, over="block") for name, label in _BLOCK_LABELS.items()),
    *(
        column_reading(name, label, over="point", log=name == "massive_activation")
        for name, label in _POINT_LABELS.items()
    ),
    *(
        mean_reading(f"mean_{name}", f"{label}, mean", name)
        for name, label in (_BLOCK_LABELS | _POINT_LABELS).items()
    ),
    mean_reading(
        "last_state_effective_rank",
        "effective rank of the last states",
        "state_effective_rank",
        lambda values: values[-1],
    ),
    mean_reading(
        "last_state_effective_rank_centred",
        "effective rank of the last states, centered and normalized",
        "state_effective_rank_centred",
        lambda values: values[-1],
    ),
    mean_reading(
        "curvature_drop",
        "drop of the curvature to the middle",
        "token_curvature",
        lambda values: values[0] - values[len(values) // 2],
    ),
    column_reading("matrix_nuclear_norm", "matrix nuclear norm of the last states"),
)


MEASURES = (
    Measure(
        name="geometry",
        doc="How the blocks move the stream at the measured token, and how the states X^l of all "
        "tokens of the prompt lie. No Jacobian: two products and five eigendecompositions of size "
        "min(T, d) for T tokens at every depth. Prompts of fewer than 3 tokens have the first part "
        "only.",
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
                "−Σ p log p in nats, p the shares of the eigenvalues of X^l X^lᵀ, rows unchanged "
                "(arXiv 2502.02013)",
            ),
            Column(
                "state_effective_rank",
                "layer+1",
                "e to that power (Roy and Vetterli, 2007; RankMe, arXiv 2210.02885)",
            ),
            Column(
                "state_effective_rank_centred",
                "layer+1",
                "the same of rows less their mean, each then of norm 1 "
                "(Diff-eRank, arXiv 2401.17139)",
            ),
            Column("anisotropy", "layer+1", "σ_1² / Σσ² of X^l, rows unchanged (arXiv 2405.12250)"),
            Column(
                "token_curvature",
                "layer+1",
                "mean angle in radians between successive differences of token states "
                "(arXiv 2311.04930)",
            ),
            Column(
                "linearity",
                "layer",
                "1 − min ‖s X^{l−1} Q − X^l‖² over scales s and orthogonal Q, both centered and of "
                "norm 1: Procrustes similarity (after arXiv 2405.12250, whose free linear map fits "
                "anything of fewer tokens than dimensions)",
            ),
            Column(
                "linearity_of_update",
                "layer",
                "the same of X^{l−1} and X^l − X^{l−1}, without the skip",
            ),
            Column(
                "matrix_nuclear_norm",
                "",
                "sum of the min(T, d) largest column norms of X^L with rows of norm 1, over T "
                "(arXiv 2410.10672)",
            ),
        ),
        run=prompt_by_prompt("geometry", _measure),
        readings=_READINGS,
    ),
)
