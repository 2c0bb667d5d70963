"""Spectra over depth: singular values, fits of their inverses, norms by input token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import DOCUMENT, RUN
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.tables import require

_DOCUMENT_KEYS = [*RUN, *DOCUMENT]


def singular_value_rows(records: pd.DataFrame, indices: Sequence[int]) -> pd.DataFrame:
    """Put σ_k of every document and block in rows, averaged over a document's prompts.

    Args:
        records: of prompts.
        indices: numbers k, counted from 1.

    Returns:
        One row per run, document, k and block: ``model, revision, weights, task, doc_hash,
        prompt_hash, k, depth, value``.

    Raises:
        CouplingError: if no singular values were recorded, or fewer than asked for.
    """
    records = require(records, ["singular_values"])
    most = min(values.shape[1] for values in records["singular_values"])
    if unknown := [k for k in indices if not 1 <= k <= most]:
        raise CouplingError(
            f"got singular value {unknown[0]}, expected 1 to {most}, which all records have; "
            f"measure again with coupling_ranks={max(unknown[0], 1)}"
        )
    rows = []
    for record in records.to_dict("records"):
        about = {key: record[key] for key in _DOCUMENT_KEYS}
        for k in indices:
            values = record["singular_values"][:, k - 1].astype(np.float64)
            depth = np.arange(1.0, len(values) + 1)
            rows.append(pd.DataFrame(about | {"k": k, "depth": depth, "value": values}))
    keys = [*_DOCUMENT_KEYS, "k", "depth"]
    return pd.concat(rows).groupby(keys, sort=False, as_index=False)["value"].mean()


def fit_inverses(rows: pd.DataFrame) -> pd.DataFrame:
    """Fit a least-squares line to 1/σ_k over depth, for every run and k.

    Args:
        rows: medians over documents, ``model, revision, weights, k, depth, median``.

    Returns:
        ``model, revision, weights, k, slope, intercept, r2``; NaN where a singular value is 0 or
        there are fewer than 3 blocks.
    """
    fits = []
    for key, of in rows.groupby([*RUN, "k"], sort=False):
        depth, sigma = of["depth"].to_numpy(), of["median"].to_numpy()
        slope = intercept = r2 = np.nan
        if len(depth) > 2 and (sigma > 0).all():
            slope, intercept = np.polyfit(depth, 1 / sigma, 1)
            r2 = np.corrcoef(depth, 1 / sigma)[0, 1] ** 2
        fit = {"slope": slope, "intercept": intercept, "r2": r2}
        fits.append(dict(zip([*RUN, "k"], key, strict=True)) | fit)
    return pd.DataFrame(fits)


def median_document_fits(records: pd.DataFrame, indices: Sequence[int]) -> pd.DataFrame:
    """Return the medians over documents of the recorded fits, which are those of single prompts.

    Args:
        records: of prompts.
        indices: numbers k, counted from 1.

    Returns:
        One row per run and k: ``slope_documents, r2_documents``.

    Raises:
        CouplingError: if the spectra were not measured.
    """
    records = require(records, ["depth_slope", "depth_r2"])
    rows = [
        {key: record[key] for key in RUN}
        | {"k": k, "slope_documents": record["depth_slope"][k - 1]}
        | {"r2_documents": record["depth_r2"][k - 1]}
        for record in records.to_dict("records")
        for k in indices
    ]
    return pd.DataFrame(rows).groupby([*RUN, "k"], sort=False, as_index=False).median()


def influence_rows(records: pd.DataFrame, last: int = 16) -> pd.DataFrame:
    """Put ‖J_{t T}‖ in rows: how much input token t moves the measured token T, for every block.

    Args:
        records: of prompts.
        last: number of tokens up to the measured one; shorter prompts are left out.

    Returns:
        One row per document, block and token: ``model, revision, weights, task, doc_hash,
        prompt_hash, depth, token, frobenius, spectral``. Token ``0`` is the measured one, ``-1``
        the one before it, ``first`` the first of the prompt.

    Raises:
        CouplingError: if the spectra were not measured, or all prompts are too short.
    """
    records = require(records, ["frobenius_norms", "spectral_norms"])
    fitting = records[records["position"] >= last]
    if fitting.empty:
        raise CouplingError(
            f"got prompts of at most {records['position'].max() + 1} tokens up to the measured "
            f"one, expected more than {last}; give a smaller --last"
        )
    rows = []
    for record in fitting.to_dict("records"):
        about = {key: record[key] for key in _DOCUMENT_KEYS}
        tokens = {"first": 0} | {str(k): record["position"] + k for k in range(1 - last, 1)}
        for name, token in tokens.items():
            norms = {
                kind: record[f"{kind}_norms"][:, token].astype(np.float64)
                for kind in ("frobenius", "spectral")
            }
            depth = np.arange(1.0, len(norms["spectral"]) + 1)
            rows.append(pd.DataFrame(about | {"depth": depth, "token": name} | norms))
    keys = [*_DOCUMENT_KEYS, "depth", "token"]
    groups = pd.concat(rows).groupby(keys, sort=False, as_index=False)
    return groups[["frobenius", "spectral"]].mean()
