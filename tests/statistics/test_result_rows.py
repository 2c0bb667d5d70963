"""Results as rows, and mistakes told in a sentence."""

import subprocess
import sys

import numpy as np
import pytest
from published import ANSCOMBE, LONGLEY, OTHERS

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics import (
    accuracy_by_bin,
    as_frame,
    correlation,
    exponential_fit,
    family_effect,
    line_fit,
    nested_models,
    partial_correlation,
)

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)


def test_results_are_rows_of_a_table():
    frame = as_frame([line_fit(*ANSCOMBE), exponential_fit(*ANSCOMBE, resamples=9)])
    assert len(frame) == 2 and {
        "slope",
        "slope_stderr",
        "slope_low",
        "c_high",
        "r2",
        "p",
        "notes",
    } <= set(frame.columns)
    row = nested_models(LONGLEY, score="TOTEMP", predictor="YEAR", covariates=OTHERS).to_dict()
    assert (
        row["covariates"] == "; ".join(OTHERS)
        and "without_aic" in row
        and "partial_coefficient" in row
    )
    assert not any(isinstance(cell, dict | tuple | np.ndarray) for cell in row.values())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: correlation([1, 2, 3], [1, 2]), "lengths"),
        (lambda: correlation(["a", "b", "c"], [1, 2, 3]), "x that is not numeric"),
        (lambda: correlation([1, 2, 3], [1, 2, 3], method="cosine"), "pearson, spearman, kendall"),
        (lambda: partial_correlation(LONGLEY, "GNP", "speed", []), "no column 'speed'"),
        (
            lambda: nested_models(LONGLEY, score="GNP", predictor="POP", covariates=["POP"]),
            "each of them once",
        ),
        (
            lambda: family_effect(
                LONGLEY, score="GNP", predictor="POP", family="YEAR", method="fixed"
            ),
            "'mixed' or 'cluster'",
        ),
        (lambda: accuracy_by_bin([1], [1], bins=0), "bins=0"),
    ],
)
def test_mistakes_are_said(call, message):
    from jaxtyping import TypeCheckError

    with pytest.raises((CouplingError, TypeCheckError)) as caught:
        call()
    assert isinstance(caught.value, TypeCheckError) or message in str(caught.value)


def test_correlations_need_no_statsmodels_and_regressions_say_so():
    program = """
import sys
sys.modules["statsmodels"] = None
from lm_eval_coupling.statistics import correlation, line_fit
print(correlation([1, 2, 3, 4], [1, 3, 2, 4], resamples=9).n)
assert not any(name in sys.modules for name in ("torch", "lm_eval"))
try:
    line_fit([1, 2, 3], [1, 2, 4])
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.startswith("4\n") and "lm-eval-coupling[analysis]" in ran.stdout, ran.stderr
