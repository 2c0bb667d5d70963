"""Regularity of the stream's trajectory: straightness, exponential growth, equal steps, entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.registry import Column, Measure, column_reading

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measures.contract import Batch, TracedPrompt

WINDOW = 11  # Blocks, as in the paper; all blocks of a shallower model.
AT_ONCE = 1 << 24  # Numbers of trajectories in memory at a time.
TOKENS_AT_ONCE = 64  # A long prompt's trajectories in double precision would be large.


def run(batch: Batch) -> list[MeasureResult]:
    """Measure the regularity of every prompt's trajectory."""
    entropies = _entropies(batch) if len(batch) > 1 else {}
    at_once = max(1, AT_ONCE // batch.trajectories[0].numel())
    return batch.measure_together(
        lambda prompts: _measure(prompts, entropies), "regularity", at_once
    )


def _entropies(batch: Batch) -> dict[int, Any]:
    """Return the entropies of prompts by index, from passes over several prompts.

    Empty if a pass fails: each prompt is then decoded alone, and a failure names its own reason.
    """
    import torch

    from lm_eval_coupling.measures.formulas.trajectory import entropy
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.memory import POINTS
    from lm_eval_coupling.numerics.transfer import on_host

    model: Any = batch.model
    try:
        stream = torch.stack(list(batch.trajectories)).to(batch.traces[0].resid_final.device)
        parts = stream.split(max(1, POINTS // stream.shape[1]))
        entropies = torch.cat([entropy(off_mps(model.logits(part))) for part in parts])
        return dict(enumerate(on_host(entropies)))
    except Exception:
        return {}


def _measure(prompts: Sequence[TracedPrompt], entropies: Mapping[int, Any]) -> list[MeasureResult]:
    """Measure several prompts; ``entropies`` are those known already, by the prompt's index."""
    import torch

    x, window = torch.stack([prompt.trajectory for prompt in prompts]), prompts[0].settings.window
    if window is None:
        window = min(WINDOW, x.shape[1] - 1)
    rows = zip(prompts, _trajectory_columns(x, window), _token_scores(prompts), strict=True)
    return [
        _result(
            prompt,
            columns | {"window": window, "line_shape_scores": scores},
            entropies.get(prompt.index),
        )
        for prompt, columns, scores in rows
    ]


def _trajectory_columns(x: Tensor, window: int) -> list[dict[str, Any]]:
    """Return the numbers of x^0 … x^L of each prompt at its measured token."""
    from lm_eval_coupling.measures.formulas import trajectory as formulas
    from lm_eval_coupling.numerics.transfer import rows_on_host

    rows = rows_on_host(
        {
            "line_shape_score": formulas.line_shape_score(x),
            "expodistance": formulas.expodistance(x),
            "norms": formulas.norms(x),
            "windowed_line_shape": formulas.line_shape_score(x, window),
            "windowed_expodistance": formulas.expodistance(x, window),
            "step_lengths": formulas.step_lengths(x),
            "equidistance": formulas.equidistance(x),
        }
    )
    return [
        {name: value if value.ndim else float(value) for name, value in row.items()} for row in rows
    ]


def _result(prompt: TracedPrompt, columns: dict[str, Any], known_entropy: Any) -> MeasureResult:
    reasons = _undefined(columns)
    if known_entropy is None:
        entropy, failures = _entropy(prompt)
    else:
        entropy, failures = {"entropy": known_entropy}, ()
    return MeasureResult(columns | entropy | _components(prompt), (*reasons, *failures))


def _undefined(columns: dict[str, Any]) -> tuple[Reason, ...]:
    names = [name for name in ("line_shape_score", "expodistance") if math.isnan(columns[name])]
    if not names:
        return ()
    listed = " and ".join(name.replace("_", "-") for name in names)
    return (Reason("undefined", f"undefined {listed}: a step, a norm or their sum is zero"),)


def _entropy(prompt: TracedPrompt) -> tuple[dict[str, Any], tuple[Reason, ...]]:
    """Return the entropy of the logits at every depth, or why the head failed."""
    from lm_eval_coupling.errors import reason_of
    from lm_eval_coupling.measures.formulas.trajectory import entropy
    from lm_eval_coupling.numerics.devices import off_mps

    model: Any = prompt.model
    try:
        logits = model.logits(prompt.trace.trajectory(prompt.position))
        return {"entropy": entropy(off_mps(logits))}, ()
    except Exception as error:
        reason = reason_of(error)
        return {}, (Reason(reason.code, f"no entropy: {reason.words}"),)


def _token_scores(prompts: Sequence[TracedPrompt]) -> list[Any]:
    """Return the line-shape scores of all tokens of each prompt."""
    from lm_eval_coupling.measures.formulas.trajectory import line_shape_score
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.transfer import all_on_host

    traces: list[Any] = [prompt.trace for prompt in prompts]
    starts = [range(0, trace.resid_final.shape[1], TOKENS_AT_ONCE) for trace in traces]
    scores = [
        line_shape_score(off_mps(trace.trajectories(slice(i, i + TOKENS_AT_ONCE))))
        for trace, trace_starts in zip(traces, starts, strict=True)
        for i in trace_starts
    ]
    parts = iter(all_on_host(scores))
    return [
        np.concatenate([next(parts).numpy() for _ in prompt_starts]) for prompt_starts in starts
    ]


def _components(prompt: TracedPrompt) -> dict[str, Any]:
    """Return all tokens' trajectories along their principal components, if asked for."""
    from lm_eval_coupling.measures.formulas.trajectory import principal_trajectories
    from lm_eval_coupling.numerics.devices import off_mps

    if not prompt.settings.trajectories:
        return {}
    trace: Any = prompt.trace
    points, share = principal_trajectories(off_mps(trace.trajectories(slice(None))))
    return {"trajectories": points, "trajectory_variance": share}


_KEPT = "coupling_trajectories=1"
MEASURES = (
    Measure(
        name="regularity",
        doc="Regularity of the residual stream x^0 … x^L at the measured token, x^0 being the "
        "input of the first block.",
        columns=(
            Column(
                "line_shape_score",
                "",
                "L / ‖Σ_l Δx^l / ‖Δx^l‖‖: 1 for a straight line, larger otherwise (paper)",
            ),
            Column(
                "expodistance",
                "",
                "variance over squared mean of ln(‖x^l‖/‖x^{l−1}‖): 0 for exponential growth "
                "(paper)",
            ),
            Column("norms", "layer+1", "‖x^l‖"),
            Column("line_shape_scores", "seq", "line-shape score of every token of the prompt"),
            Column("window", "", "blocks of the windowed numbers", "whole"),
            Column(
                "windowed_line_shape",
                "window",
                "line-shape score of every window of blocks, in order of depth",
            ),
            Column("windowed_expodistance", "window", "expodistance of every window of blocks"),
            Column("step_lengths", "layer", "‖x^l − x^{l−1}‖"),
            Column(
                "equidistance",
                "",
                "coefficient of variation of the step lengths: 0 for equal steps",
            ),
            Column(
                "entropy",
                "layer+1",
                "entropy in nats of the logits that the model's own head decodes from x^l",
            ),
            Column(
                "trajectories",
                "seq layer+1 component",
                "every token's trajectory along the at most 3 principal components of the last "
                "points",
                option=_KEPT,
            ),
            Column(
                "trajectory_variance",
                "component",
                "each component's share of the variance there",
                option=_KEPT,
            ),
        ),
        run=run,
        version=2,
        settings=("window", "trajectories"),
        default=True,
        readings=(
            column_reading(
                "line_shape_score",
                "line-shape score",
                sign=-1,
                doc="1 where the stream moves in a straight line from block to block, larger where "
                "it turns.",
            ),
            column_reading(
                "expodistance",
                "expodistance",
                sign=-1,
                doc="0 where the norm of the stream grows by the same factor in every block.",
            ),
            column_reading(
                "equidistance",
                "variation of step lengths",
                doc="0 where every block moves the stream by the same distance.",
            ),
            column_reading("norms", "norm ‖x‖", over="point", log=True),
            column_reading("step_lengths", "step length ‖Δx‖", over="block", log=True),
            column_reading("windowed_line_shape", "line-shape score, windowed", over="window"),
            column_reading("windowed_expodistance", "expodistance, windowed", over="window"),
            column_reading("entropy", "entropy of the decoded logits (nats)", over="point"),
        ),
    ),
)
