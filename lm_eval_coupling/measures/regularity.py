"""How regular the trajectory of the stream is: straightness, exponential growth, equal steps, entropy as it is decoded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.registry import Column, Found, Measure, of_column

if TYPE_CHECKING:
    from lm_eval_coupling.measuring.batch import Batch, TracedPrompt

WINDOW = 11  # blocks, as in the paper; all of them where a model has fewer


def run(batch: Batch) -> list[Found]:
    """Regularity of every prompt's trajectory."""
    entropies = _entropies(batch) if len(batch) > 1 else {}
    return batch.each(lambda one: _of_prompt(one, entropies.get(one.index)), "regularity")


def _entropies(batch: Batch, points: int = 512) -> dict[int, Any]:
    """Entropy at every depth of each prompt, a few prompts in one pass; none where that fails, then each alone says why."""
    import torch

    from lm_eval_coupling.measures.formulas.trajectory import entropy
    from lm_eval_coupling.numerics.devices import off_mps

    model: Any = batch.model
    try:
        stream = torch.stack([one.trace.trajectory(one.position) for one in batch])
        parts = stream.split(max(1, points // stream.shape[1]))
        return dict(enumerate(torch.cat([entropy(off_mps(model.logits(part))) for part in parts])))
    except Exception:
        return {}


def _of_prompt(one: TracedPrompt, known_entropy: Any = None) -> Found:
    from lm_eval_coupling.measures.formulas import trajectory as maths

    x, asked = one.trajectory, one.settings.window
    window = min(WINDOW, len(x) - 1) if asked is None else asked
    scores = {"line_shape_score": maths.line_shape_score(x).item(), "expodistance": maths.expodistance(x).item()}
    entropy, reasons = _entropy(one) if known_entropy is None else ({"entropy": known_entropy}, ())
    columns = (
        scores
        | entropy
        | {
            "norms": maths.norms(x),
            "line_shape_scores": _line_shape_scores(one),
            "window": window,
            "windowed_line_shape": maths.line_shape_score(x, window),
            "windowed_expodistance": maths.expodistance(x, window),
            "step_lengths": maths.step_lengths(x),
            "equidistance": maths.equidistance(x).item(),
        }
    )
    return Found(columns | _trajectories(one), (*_undefined(scores), *reasons))


def _undefined(scores: dict[str, float]) -> tuple[Reason, ...]:
    names = " and ".join(name.replace("_", "-") for name, score in scores.items() if math.isnan(score))
    return (Reason("undefined", f"undefined {names}: a step, a norm or their sum is zero"),) if names else ()


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


def _line_shape_scores(one: TracedPrompt, at_once: int = 64) -> Any:
    """Of every token, so many at once: a double-precision trajectory of all of a long prompt would be large."""
    import torch

    from lm_eval_coupling.measures.formulas.trajectory import line_shape_score
    from lm_eval_coupling.numerics.devices import off_mps

    trace: Any = one.trace
    starts = range(0, trace.resid_final.shape[1], at_once)
    parts = [line_shape_score(off_mps(trace.trajectories(slice(i, i + at_once)))) for i in starts]
    return torch.cat([part.cpu() for part in parts])


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
            Column("line_shape_score", "", "L / ‖Σ_l Δx^l / ‖Δx^l‖‖: 1 for a straight line, larger otherwise (paper)"),
            Column(
                "expodistance", "", "variance over squared mean of ln(‖x^l‖/‖x^{l−1}‖): 0 for exponential growth (paper)"
            ),
            Column("norms", "layer+1", "‖x^l‖"),
            Column("line_shape_scores", "seq", "line-shape score of every token of the prompt"),
            Column("window", "", "blocks of the windowed numbers", "whole"),
            Column("windowed_line_shape", "window", "line-shape score of every window of blocks, in order of depth"),
            Column("windowed_expodistance", "window", "expodistance of every window of blocks"),
            Column("step_lengths", "layer", "‖x^l − x^{l−1}‖"),
            Column("equidistance", "", "coefficient of variation of the step lengths: 0 for equal steps"),
            Column("entropy", "layer+1", "of the logits that the model's own head decodes from x^l, in nats"),
            Column(
                "trajectories",
                "seq layer+1 component",
                "every token's trajectory along the at most 3 principal components of the last points",
                option=_KEPT,
            ),
            Column("trajectory_variance", "component", "each component's share of the variance there", option=_KEPT),
        ),
        run=run,
        version=2,
        settings=("window", "trajectories"),
        default=True,
        readings=(
            of_column("line_shape_score", "line-shape score", sign=-1),
            of_column("expodistance", "expodistance", sign=-1),
            of_column("equidistance", "variation of step lengths"),
            of_column("norms", "norm ‖x‖", over="point", log=True),
            of_column("step_lengths", "step length ‖Δx‖", over="block", log=True),
            of_column("windowed_line_shape", "line-shape score, windowed", over="window"),
            of_column("windowed_expodistance", "expodistance, windowed", over="window"),
            of_column("entropy", "entropy of the decoded logits (nats)", over="point"),
        ),
    ),
)
