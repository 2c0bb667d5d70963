"""Representations of the measured tokens, and their spread over documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas import spread
from lm_eval_coupling.measures.registry import Column, Measure, SampleReading, prompt_by_prompt

if TYPE_CHECKING:
    from lm_eval_coupling.measures.contract import TracedPrompt


def _measure(prompt: TracedPrompt) -> MeasureResult:
    """Record the state of the measured token after the last block."""
    return MeasureResult({"representation": prompt.trajectory[-1]})


MEASURES = (
    Measure(
        name="representations",
        doc="The state of the measured token after the last block. The summary of a task has its "
        "spread over documents, as two rivals of coupling: α-ReQ and RankMe (arXiv 2509.23024). "
        "Both depend on the number of documents, so compare runs of the same ones; below 20 they "
        "are undefined. Standard errors leave out a twentieth of the documents at a time. Of a "
        "group they are means over its tasks.",
        columns=(
            Column("representation", "d_model", "x^L at the measured token, before the final norm"),
        ),
        run=prompt_by_prompt("representations", _measure),
        sample_readings=(
            SampleReading(
                name="alpha_req",
                label="α-ReQ, decay of the variances",
                column="representation",
                read=spread.alpha_req,
                fewest=spread.FEWEST,
                doc="α of λ_i ∝ i^−α, fitted to the eigenvalues of the covariance over documents "
                "from the fourth to the middle one (Agrawal et al., NeurIPS 2022).",
            ),
            SampleReading(
                name="rankme",
                label="RankMe, effective rank over documents",
                column="representation",
                read=spread.rank_me,
                fewest=spread.FEWEST,
                doc="exp of the entropy of σ/Σσ, the singular values of the representations of all "
                "documents, not centered (arXiv 2210.02885).",
            ),
        ),
    ),
)
