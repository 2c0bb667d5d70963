"""Coupling between tokens (paper, eqs. 16–18).

*Self-coupling* compares the Jacobians J_tt of different tokens. *Context coupling* compares those
that share their input token (J_{s t} for t after s) or their output token (J_{t T} for t before T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.choices import chosen_layers, chosen_tokens
from lm_eval_coupling.measures.registry import Column, Measure, prompt_by_prompt

if TYPE_CHECKING:
    from lm_eval_coupling.measures.contract import Settings, TracedPrompt


PAIRS = "rank chosen chosen token token"


def _choices(prompt: TracedPrompt) -> tuple[list[int], list[int]]:
    """Return the chosen layers and tokens."""
    settings, n_layers = prompt.settings, len(prompt.trace.calls)
    return chosen_layers(settings.layers, n_layers), chosen_tokens(settings.tokens, prompt.last)


def _self_coupling(prompt: TracedPrompt) -> MeasureResult:
    """Measure m̃ between the J_tt of the chosen tokens, for all pairs of the chosen layers."""
    from lm_eval_coupling.measures.formulas.layer_pairs import jacobians_over, miscoupling_of_all

    layers, tokens = _choices(prompt)
    pairs = [(token, token) for token in tokens]
    jacobians = jacobians_over(prompt.trace, layers, pairs, prompt.settings.method)
    miscouplings = miscoupling_of_all(jacobians, prompt.settings.ranks)
    return MeasureResult(
        {"self_tokens": tokens, "self_layers": layers, "self_miscoupling": miscouplings}
    )


def _context_coupling(prompt: TracedPrompt) -> MeasureResult:
    """Measure m̃ between Jacobians that share the first chosen input or the measured output."""
    import numpy as np

    from lm_eval_coupling.measures.formulas.layer_pairs import jacobians_over, miscoupling_of_all

    layers, tokens = _choices(prompt)
    method, ranks = prompt.settings.method, prompt.settings.ranks
    pairs = {
        "context_input_miscoupling": [(token, tokens[0]) for token in tokens],
        "context_output_miscoupling": [(prompt.position, token) for token in tokens],
    }
    columns = {
        name: miscoupling_of_all(jacobians_over(prompt.trace, layers, shared, method), ranks)
        for name, shared in pairs.items()
    }
    undefined = sum(int(np.isnan(matrices[-1]).sum()) for matrices in columns.values())
    size = 2 * (len(layers) * len(tokens)) ** 2
    words = (
        f"{undefined} of {size} context couplings are undefined: "
        "a Jacobian is zero or of too low a rank"
    )
    reasons = (Reason("zero_or_low_rank", words),) if undefined else ()
    return MeasureResult({"context_tokens": tokens, "context_layers": layers} | columns, reasons)


def _extra(kinds: int) -> Callable[[int, int, Settings], tuple[int, int]]:
    def extra(n_layers: int, position: int, settings: Settings) -> tuple[int, int]:
        layers = chosen_layers(settings.layers, n_layers)
        held = len(layers) * len(chosen_tokens(settings.tokens, position))
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
        run=prompt_by_prompt("self", _self_coupling),
        version=2,
        settings=_SETTINGS,
        option=_EXAMPLE,
        extra=_extra(1),
    ),
    Measure(
        name="context",
        doc="Context coupling: Jacobians from one token to others and from others to one, in each "
        "other's bases. NaN where a Jacobian is zero, because a later token cannot move an earlier "
        "one or lies outside a sliding window.",
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
        run=prompt_by_prompt("context", _context_coupling),
        version=2,
        settings=_SETTINGS,
        option=_EXAMPLE,
        extra=_extra(2),
    ),
)
