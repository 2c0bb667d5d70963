"""A series of models whose truth is known, and what `fit` finds in it."""

import math

import numpy as np
import pandas as pd
import pytest
from fitted_runs import QUICK, save_model

from lm_eval_coupling.fit.findings import fit_runs


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Eighteen models of six families whose accuracy depends on coupling, not on size."""
    folder, rng = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    truth = []
    for i in range(18):
        coupling, size = rng.uniform(0.1, 0.3), 10 ** rng.uniform(8, 10)
        scores = {
            "arc": 0.2 + 1.5 * coupling + rng.normal(0, 0.03),
            "gsm": 0.1 + 2 * coupling + rng.normal(0, 0.05),
        }
        model = f"org/{'abcdef'[i % 6]}-{i + 1}b{'-chat' if i % 2 else ''}"
        save_model(folder, model, coupling, scores, n_params=size)
        truth.append({"label": model[4:], "coupling": coupling, "size": math.log10(size)} | scores)
    return folder, pd.DataFrame(truth).set_index("label")


@pytest.fixture(scope="module")
def found(series):
    return fit_runs(
        series[0], x=["coupling@10", "coupling@30", "line_shape_score"], resamples=QUICK
    )
