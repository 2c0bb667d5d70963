"""Singular values of the blocks with depth, and the straight line through their inverses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from coupling_analysis.study_tables import DOCUMENT, RUN
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.tables import require


def singular_values(records: pd.DataFrame, indices: Sequence[int]) -> pd.DataFrame:
    """σ_k of every document and block: ``model, revision, weights, task, doc_hash, prompt_hash, k, depth, value``.

    Args:
        records: of prompts.
        indices: k, counted from 1.

    Returns:
        One row per run, task, document, block and k.

    Raises:
        CouplingError: if no singular values were recorded, or not so many.
    """
    records = require(records, ["singular_values"])
    most = min(values.shape[1] for values in records["singular_values"])
    if bad := [k for k in indices if not 1 <= k <= most]:
        raise CouplingError(
            f"got singular value {bad[0]}, expected 1 to {most}, which all records have; measure again with "
            f"coupling_ranks={max(bad[0], 1)}"
        )
    rows = []
    for record in records.to_dict("records"):
        about = {key: record[key] for key in (*RUN, *DOCUMENT)}
        for k in indices:
            values = record["singular_values"][:, k - 1].astype(np.float64)
            rows.append(
                pd.DataFrame(
                    about | {"k": k, "depth": np.arange(1.0, len(values) + 1), "value": values}
                )
            )
    keys = [*RUN, *DOCUMENT, "k", "depth"]
    return pd.concat(rows).groupby(keys, sort=False, as_index=False)["value"].mean()


def inverse_fits(rows: pd.DataFrame) -> pd.DataFrame:
    """Least-squares line of 1/σ_k against depth, and its R², for every run and k of quartiles over documents.

    Args:
        rows: ``model, revision, weights, k, depth, median``.

    Returns:
        ``model, revision, weights, k, slope, intercept, r2``; NaN where a singular value is 0 or there are not 3 blocks.
    """
    found = []
    for key, of in rows.groupby([*RUN, "k"], sort=False):
        depth, sigma = of["depth"].to_numpy(), of["median"].to_numpy()
        slope = intercept = r2 = np.nan
        if len(depth) > 2 and (sigma > 0).all():
            slope, intercept = np.polyfit(depth, 1 / sigma, 1)
            r2 = np.corrcoef(depth, 1 / sigma)[0, 1] ** 2
        found.append(
            dict(zip([*RUN, "k"], key, strict=True))
            | {"slope": slope, "intercept": intercept, "r2": r2}
        )
    return pd.DataFrame(found)


def document_fits(records: pd.DataFrame, indices: Sequence[int]) -> pd.DataFrame:
    """Medians over documents of the recorded fits of single prompts: ``slope_documents, r2_documents`` per run and k.

    Returns:
        One row per run and k.

    Raises:
        CouplingError: if the spectra were not measured.
    """
    records = require(records, ["depth_slope", "depth_r2"])
    rows = [
        {key: record[key] for key in RUN}
        | {
            "k": k,
            "slope_documents": record["depth_slope"][k - 1],
            "r2_documents": record["depth_r2"][k - 1],
        }
        for record in records.to_dict("records")
        for k in indices
    ]
    return pd.DataFrame(rows).groupby([*RUN, "k"], sort=False, as_index=False).median()


def influence(records: pd.DataFrame, last: int = 16) -> pd.DataFrame:
    """How much the input tokens of every block move the measured token: ‖J_{t1 T}‖ of the first and the ``last`` tokens.

    Args:
        records: of prompts.
        last: tokens up to the measured one; only prompts that have more count.

    Returns:
        ``model, revision, weights, task, doc_hash, prompt_hash, depth, token`` (0 is the measured one, -1 the one before
        it, …, ``first`` the prompt's first) ``, frobenius, spectral``.

    Raises:
        CouplingError: if the spectra were not measured, or all prompts are shorter.
    """
    records = require(records, ["frobenius_norms", "spectral_norms"])
    long = records[records["position"] >= last]
    if long.empty:
        most = records["position"].max() + 1
        raise CouplingError(
            f"got prompts of at most {most} tokens up to the measured one, expected more than {last}; give a smaller --last"
        )
    rows = []
    for record in long.to_dict("records"):
        about = {key: record[key] for key in (*RUN, *DOCUMENT)}
        at = record["position"]
        for token, name in [
            (0, "first"),
            *((at + offset, str(offset)) for offset in range(1 - last, 1)),
        ]:
            norms = {
                kind: record[f"{kind}_norms"][:, token].astype(np.float64)
                for kind in ("frobenius", "spectral")
            }
            depth = np.arange(1.0, len(norms["spectral"]) + 1)
            rows.append(pd.DataFrame(about | {"depth": depth, "token": name} | norms))
    keys = [*RUN, *DOCUMENT, "depth", "token"]
    return (
        pd.concat(rows).groupby(keys, sort=False, as_index=False)[["frobenius", "spectral"]].mean()
    )
