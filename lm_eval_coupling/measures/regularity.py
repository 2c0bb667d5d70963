"""How regular the trajectory of the stream is: straightness, exponential growth, equal steps, entropy as it is decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.registry import Column, Measure, MeasureResult, column_reading

if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_coupling.measuring.batch import Batch, TracedPrompt

WINDOW = 11  # blocks, as in the paper; all of them where a model has fewer
AT_ONCE = 1 << 24  # numbers of the trajectories that are looked at together


def run(batch: Batch) -> list[MeasureResult]:
    """Regularity of every prompt's trajectory."""
    entropies = _entropies(batch) if len(batch) > 1 else {}
    at_once = max(1, AT_ONCE // batch.trajectories[0].numel())
    return batch.measure_together(
        lambda prompts: _of_prompts(prompts, entropies), "regularity", at_once
    )


def _entropies(batch: Batch) -> dict[int, Any]:
    """Entropy at every depth of each prompt, a few prompts in one pass; none where that fails, then each alone says why."""
    import torch

    from lm_eval_coupling.measures.formulas.trajectory import entropy
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.memory import POINTS
    from lm_eval_coupling.numerics.transfer import on_host

    model: Any = batch.model
    try:
        stream = torch.stack(batch.trajectories).to(batch.traces[0].resid_final.device)
        parts = stream.split(max(1, POINTS // stream.shape[1]))
        found = torch.cat([entropy(off_mps(model.logits(part))) for part in parts])
        return dict(enumerate(on_host(found)))
    except Exception:
        return {}


def _of_prompts(
    prompts: Sequence[TracedPrompt], entropies: Mapping[int, Any]
) -> list[MeasureResult]:
    """``entropies`` are those that are known already, by the prompt's place in the batch."""
    import torch

    x, asked = torch.stack([one.trajectory for one in prompts]), prompts[0].settings.window
    window = min(WINDOW, x.shape[1] - 1) if asked is None else asked
    of_token = _line_shape_scores(prompts)
    return [
        _found(
            one, numbers | {"window": window, "line_shape_scores": scores}, entropies.get(one.index)
        )
        for one, numbers, scores in zip(prompts, _numbers(x, window), of_token, strict=True)
    ]


def _numbers(x: Tensor, window: int) -> list[dict[str, Any]]:
    """What follows from x^0 … x^L of each prompt at its measured token."""
    from lm_eval_coupling.measures.formulas import trajectory as maths
    from lm_eval_coupling.numerics.transfer import rows_on_host

    rows = rows_on_host(
        {
            "line_shape_score": maths.line_shape_score(x),
            "expodistance": maths.expodistance(x),
            "norms": maths.norms(x),
            "windowed_line_shape": maths.line_shape_score(x, window),
            "windowed_expodistance": maths.expodistance(x, window),
            "step_lengths": maths.step_lengths(x),
            "equidistance": maths.equidistance(x),
        }
    )
    return [
        {name: value if value.ndim else float(value) for name, value in row.items()} for row in rows
    ]


def _found(one: TracedPrompt, columns: dict[str, Any], known_entropy: Any) -> MeasureResult:
    entropy, reasons = _entropy(one) if known_entropy is None else ({"entropy": known_entropy}, ())
    scores = {name: columns[name] for name in ("line_shape_score", "expodistance")}
    return MeasureResult(columns | entropy | _trajectories(one), (*_undefined(scores), *reasons))


def _undefined(scores: dict[str, float]) -> tuple[Reason, ...]:
    names = " and ".join(
        name.replace("_", "-") for name, score in scores.items() if math.isnan(score)
    )
    return (
        (Reason("undefined", f"undefined {names}: a step, a norm or their sum is zero"),)
        if names
        else ()
    )


def _entropy(one: TracedPrompt) -> tuple[dict[str, Any], tuple[Reason, ...]]:
    """Of the logits at every depth; a head that fails costs nothing else."""
    from lm_eval_coupling.errors import reason_of
    from lm_eval_coupling.measures.formulas.trajectory import entropy
    from lm_eval_coupling.numerics.devices import off_mps

    try:
        model: Any = one.model
        return {"entropy": entropy(off_mps(model.logits(one.trace.trajectory(one.position))))}, ()
    except Exception as error:
        reason = reason_of(error)
        return {}, (Reason(reason.code, f"no entropy: {reason.words}"),)


def _line_shape_scores(prompts: Sequence[TracedPrompt], at_once: int = 64) -> list[Any]:
    """Of every token, so many at once: a double-precision trajectory of all of a long prompt would be large."""
    from lm_eval_coupling.measures.formulas.trajectory import line_shape_score
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.transfer import all_on_host

    traces: list[Any] = [one.trace for one in prompts]
    starts = [range(0, trace.resid_final.shape[1], at_once) for trace in traces]
    slices = [
        (trace, slice(i, i + at_once))
        for trace, of_trace in zip(traces, starts, strict=True)
        for i in of_trace
    ]
    parts = iter(
        all_on_host(
            [line_shape_score(off_mps(trace.trajectories(tokens))) for trace, tokens in slices]
        )
    )
    return [np.concatenate([next(parts).numpy() for _ in of_trace]) for of_trace in starts]


def _trajectories(one: TracedPrompt) -> dict[str, Any]:
    from lm_eval_coupling.measures.formulas.trajectory import principal_trajectories
    from lm_eval_coupling.numerics.devices import off_mps

    if not one.settings.trajectories:
        return {}
    trace: Any = one.trace
    points, share = principal_trajectories(off_mps(trace.trajectories(slice(None))))
    return {"trajectories": points, "trajectory_variance": share}


_KEPT = "coupling_trajectories=1"
MEASURES = (
    Measure(
        name="regularity",
        doc="Regularity of the residual stream x^0 … x^L at the measured token, x^0 being the input of the first block.",
        columns=(
            Column(
                "line_shape_score",
                "",
                "L / ‖Σ_l Δx^l / ‖Δx^l‖‖: 1 for a straight line, larger otherwise (paper)",
            ),
            Column(
                "expodistance",
                "",
                "variance over squared mean of ln(‖x^l‖/‖x^{l−1}‖): 0 for exponential growth (paper)",
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
                "of the logits that the model's own head decodes from x^l, in nats",
            ),
            Column(
                "trajectories",
                "seq layer+1 component",
                "every token's trajectory along the at most 3 principal components of the last points",
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
            column_reading("line_shape_score", "line-shape score", sign=-1),
            column_reading("expodistance", "expodistance", sign=-1),
            column_reading("equidistance", "variation of step lengths"),
            column_reading("norms", "norm ‖x‖", over="point", log=True),
            column_reading("step_lengths", "step length ‖Δx‖", over="block", log=True),
            column_reading("windowed_line_shape", "line-shape score, windowed", over="window"),
            column_reading("windowed_expodistance", "expodistance, windowed", over="window"),
            column_reading("entropy", "entropy of the decoded logits (nats)", over="point"),
        ),
    ),
)
