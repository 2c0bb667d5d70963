"""Influence of every token on the measured one, and the spectrum of the measured one's Jacobian."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.registry import Column, Measure, column_reading, prompt_by_prompt

if TYPE_CHECKING:
    from lm_eval_coupling.measures.contract import TracedPrompt


def _measure(prompt: TracedPrompt) -> MeasureResult:
    """Measure norms of the Jacobians from every token, and the full spectrum of J_tt."""
    import numpy as np
    import torch

    from lm_eval_coupling.measures.formulas import spectrum
    from lm_eval_coupling.measures.formulas.layer_pairs import rows_to
    from lm_eval_coupling.numerics.devices import off_mps
    from lm_eval_coupling.numerics.spectra import largest_singular_values

    token, method = prompt.position, prompt.settings.method
    rows: dict[str, list[Any]] = {
        name: [] for name in ("frobenius", "spectral", "effective_rank", "participation", "S")
    }
    for layer in range(len(prompt.trace.calls)):
        norms, own = [], None
        for tokens, part in rows_to(prompt.trace, layer, token, prompt.last, method):
            J = off_mps(part)
            frobenius = torch.linalg.vector_norm(J, dim=(1, 2), dtype=torch.float64)
            norms.append(torch.stack([frobenius, largest_singular_values(J).double()]))
            if token in tokens:
                own = J[tokens.index(token)]
        assert own is not None  # The measured token is one of those up to the last.
        S = torch.linalg.svdvals(own.cpu()).double()
        frobenius, spectral = torch.cat(norms, dim=1).cpu().numpy()
        rows["frobenius"].append(frobenius)
        rows["spectral"].append(spectral)
        rows["effective_rank"].append(spectrum.effective_rank(S))
        rows["participation"].append(spectrum.participation_ratio(S))
        rows["S"].append(S[: prompt.settings.ranks[-1]].numpy())
    slope, r2 = spectrum.inverse_against_depth(np.stack(rows["S"]))
    return MeasureResult(
        {
            "effective_rank": rows["effective_rank"],
            "participation_ratio": rows["participation"],
            "frobenius_norms": np.stack(rows["frobenius"]),
            "spectral_norms": rows["spectral"],
            "depth_slope": slope,
            "depth_r2": r2,
        }
    )


MEASURES = (
    Measure(
        name="spectra",
        doc="Influence of every token on the measured one, and the full spectrum of the measured "
        "token's own Jacobian.",
        columns=(
            Column(
                "effective_rank",
                "layer",
                "exp of the entropy of σ/Σσ of J_tt (Roy and Vetterli, 2007)",
            ),
            Column("participation_ratio", "layer", "(Σσ²)² / Σσ⁴ of J_tt"),
            Column(
                "frobenius_norms",
                "layer seq",
                "‖J‖_F from every token that can move it to the measured one",
            ),
            Column("spectral_norms", "layer seq", "‖J‖_2 of the same"),
            Column(
                "depth_slope",
                "max_rank",
                "slope of the least-squares line of 1/σ_k over depth l = 1 … L",
            ),
            Column("depth_r2", "max_rank", "R² of that line; NaN with fewer than 3 blocks"),
        ),
        run=prompt_by_prompt("spectra", _measure),
        settings=("ranks", "method"),
        readings=(
            column_reading("effective_rank", "effective rank of the Jacobian", over="block"),
            column_reading("participation_ratio", "participation ratio", over="block"),
        ),
        extra=lambda n_layers, position, settings: (n_layers * (position + 1), position + 1),
    ),
)
