"""Coupling between tokens. *Self-coupling* compares the Jacobians J_tt of different tokens, *context coupling* those that
share their input token (J_{s t} for t after s) or their output token (J_{t T} for t before T) (paper, eqs. 16–18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.formulas.choices import chosen_layers, chosen_tokens
from lm_eval_coupling.measures.registry import Column, Measure, MeasureResult

if TYPE_CHECKING:
    from lm_eval_coupling.measuring.batch import Batch, TracedPrompt
    from lm_eval_coupling.measuring.settings import Settings

PAIRS = "rank chosen chosen token token"


def run_self(batch: Batch) -> list[MeasureResult]:
    """m̃ between the J_tt of the chosen tokens of every prompt, for all pairs of the chosen layers."""
    return batch.measure_each(_self_coupling, "self")


def run_context(batch: Batch) -> list[MeasureResult]:
    """m̃ between Jacobians with the input token fixed (the first chosen) and with the output token fixed (the measured)."""
    return batch.measure_each(_context_coupling, "context")


def _chosen(one: TracedPrompt) -> tuple[list[int], list[int]]:
    return chosen_layers(one.settings.layers, len(one.trace.calls)), chosen_tokens(
        one.settings.tokens, one.last
    )


def _self_coupling(one: TracedPrompt) -> MeasureResult:
    from lm_eval_coupling.measures.formulas.layer_pairs import jacobians_over, miscoupling_of_all

    layers, tokens = _chosen(one)
    blocks = jacobians_over(one.trace, layers, [(t, t) for t in tokens], one.settings.method)
    found = miscoupling_of_all(blocks, one.settings.ranks)
    return MeasureResult({"self_tokens": tokens, "self_layers": layers, "self_miscoupling": found})


def _context_coupling(one: TracedPrompt) -> MeasureResult:
    import numpy as np

    from lm_eval_coupling.measures.formulas.layer_pairs import jacobians_over, miscoupling_of_all

    layers, tokens = _chosen(one)
    method, ranks = one.settings.method, one.settings.ranks
    pairs = {
        "context_input_miscoupling": [(t, tokens[0]) for t in tokens],
        "context_output_miscoupling": [(one.position, t) for t in tokens],
    }
    found = {
        name: miscoupling_of_all(jacobians_over(one.trace, layers, of, method), ranks)
        for name, of in pairs.items()
    }
    undefined = sum(int(np.isnan(matrices[-1]).sum()) for matrices in found.values())
    size = 2 * (len(layers) * len(tokens)) ** 2
    words = f"{undefined} of {size} context couplings are undefined: a Jacobian is zero or of rank below K"
    reasons = (Reason("zero_or_low_rank", words),) if undefined else ()
    return MeasureResult({"context_tokens": tokens, "context_layers": layers} | found, reasons)


def _extra(kinds: int) -> Callable[[int, int, Settings], tuple[int, int]]:
    def extra(n_layers: int, position: int, settings: Settings) -> tuple[int, int]:
        held = len(chosen_layers(settings.layers, n_layers)) * len(
            chosen_tokens(settings.tokens, position)
        )
        return kinds * held, held

    return extra


_TOKENS = "positions of the compared tokens, from 0"
_LAYERS = "the compared blocks, from 0"
_SETTINGS = ("ranks", "method", "tokens", "layers")
_EXAMPLE = "coupling_tokens=last8"
MEASURES = (
    Measure(
        name="self",
        doc="Self-coupling: J_tt of one block and token in the basis of another block and token.",
        columns=(
            Column("self_tokens", "token", _TOKENS, "whole"),
            Column("self_layers", "chosen", _LAYERS, "whole"),
            Column("self_miscoupling", PAIRS, "m̃ of J_tt^l in the bases of J_t't'^{l'}"),
        ),
        run=run_self,
        version=2,
        settings=_SETTINGS,
        option=_EXAMPLE,
        extra=_extra(1),
    ),
    Measure(
        name="context",
        doc="Context coupling: Jacobians from one token to others and from others to one, in each other's bases. NaN where "
        "a Jacobian is zero, because a later token cannot move an earlier one or lies outside a sliding window.",
        columns=(
            Column("context_tokens", "token", _TOKENS, "whole"),
            Column("context_layers", "chosen", _LAYERS, "whole"),
            Column(
                "context_input_miscoupling",
                PAIRS,
                "m̃ with the input token fixed, the first of the chosen",
            ),
            Column(
                "context_output_miscoupling",
                PAIRS,
                "m̃ with the output token fixed, the measured one",
            ),
        ),
        run=run_context,
        version=2,
        settings=_SETTINGS,
        option=_EXAMPLE,
        extra=_extra(2),
    ),
)
