"""Size and coverage of the statistics that speak, as measured and on a small scale."""

import importlib
import json
from pathlib import Path

import pytest
from simulations import near

pytest.importorskip("statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURED = json.loads((BENCHMARKS / "results" / "statistics_size.json").read_text())
ROWS = MEASURED["rates_in_percent"]


def name(row):
    rates = ("size", "claims", "coverage", "repetitions", "reason")
    return ", ".join(str(row[key]) for key in row if key not in rates)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_measured_rates_keep_their_promises(row):
    """At most 7 % of claims where there is nothing, and at least 92 % coverage."""
    n = row["repetitions"]
    claims = row.get("claims", row.get("size", 0)) / 100
    coverage = row.get("coverage", 95) / 100
    assert claims <= 0.07 or near(claims, 0.05, n)
    assert coverage >= 0.92 or near(coverage, 0.92, n)


@pytest.mark.slow
def test_the_benchmark_measures_what_is_written(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("statistics_size")
    kinds = ("correlation, pearson", "correlation across families", "AUROC")
    chosen = [case for case in script.cases() if case[0]["statistic"] in kinds]
    for about, chance, truth in chosen[::4]:
        rates = script.measure(chance, truth, 150)
        assert near(rates["size"] / 100, 0.05, 150), about
        assert near(rates["coverage"] / 100, 0.95, 150, slack=0.02), about
