"""A measure is one file: what it records appears in `show`, `fit` and the report."""

import io

import numpy as np
import pytest
from rich.console import Console
from saved_runs import record, save, task_summary, value
from toy_measure import toy_measure

from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.report.data import gather
from lm_eval_coupling.report.terminal import show

TOY = '''
"""A toy."""
from lm_eval_coupling.measures.registry import Column, Measure, Reading

def _last_mean(record, rank):
    return record["toy_means"][-1]

MEASURES = (
    Measure(
        name="toy",
        doc="Last of the means.",
        columns=(Column("toy_means", "layer", "mean of x^l over its coordinates"),),
        run=lambda batch: [],
        readings=(
            Reading("toy", "mean of the stream", "toy_means", _last_mean, sign=1),
        ),
    ),
)
'''

MODELS = 9  # fewer are too few for a comparison of predictors


@pytest.fixture
def toy(tmp_path, monkeypatch):
    with toy_measure(tmp_path, monkeypatch, TOY):
        yield


def test_a_measure_appears_wherever_numbers_are_read(toy, tmp_path):
    for i in range(MODELS):
        rows = [record(doc_id=d) | {"toy_means": np.float32([0, 0, 0.5 * i + d])} for d in range(4)]
        summary = task_summary(0.1 + 0.05 * (3 * i % 7))
        summary["measures"]["toy"] = value(0.5 * i + 1.5)
        save(
            tmp_path, {"arc": summary}, model=f"m{i}", rows=rows, run_id=str(i), fingerprint=str(i)
        )
    out = io.StringIO()
    show(tmp_path / "m4", console=Console(file=out, width=80))
    (line,) = [line for line in out.getvalue().splitlines() if "mean of the stream" in line]
    assert "3.5000 ± 0.6455" in line
    actual = fit_runs(tmp_path, resamples=99)
    (predictor,) = [p for p in actual.observations.predictors if p.name == "toy"]
    assert predictor.kind == "toy" and predictor.sign == 1
    assert "toy" in set(actual.tables["correlations"]["predictor"]) and "toy" in set(
        actual.tables["comparisons"]["other"]
    )
    page = gather(tmp_path)
    (reading,) = [reading for reading in page["readings"] if reading["name"] == "toy"]
    assert reading["label"] == "mean of the stream"
    assert reading["sign"] == 1 and not reading["of_rank"]
    assert [row["readings"]["toy"][""][0] for row in page["rows"]] == [
        0.5 * i + 1.5 for i in range(MODELS)
    ]
