"""One file makes a measure, and everything that is known of it is known everywhere."""

import dataclasses
import subprocess
import sys

import cases
import numpy as np
import pyarrow.parquet as pq
import pytest
from coupling_analysis.measures_page import build_page
from toy_measure import toy_measure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures import registry
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.task_summary import summarize
from lm_eval_coupling.saved.records import load_records
from lm_eval_coupling.saved.tables import write_tables

TOY = '''
"""The mean of the stream after every block."""

from lm_eval_coupling.measures.registry import Column, MeasureResult, Measure, Reading


def run(batch):
    return batch.measure_each(measure, "toy")


def measure(prompt):
    return MeasureResult({"toy_means": prompt.trajectory[1:].mean(dim=1)})


def last(record, rank):
    return record["toy_means"][-1]


MEASURES = (
    Measure(
        name="toy",
        doc="Mean of the stream.",
        columns=(Column("toy_means", "layer", "mean of x^l over its coordinates"),),
        run=run,
        readings=(Reading("toy", "mean of the stream", "toy_means", last, sign=1),),
    ),
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    with toy_measure(tmp_path, monkeypatch, TOY):
        yield


def test_a_measure_is_one_file(toy, tmp_path):
    """It appears in records, tables, summaries, options of a run, and docs."""
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    prompt = cases.tiny_tokens(5)[0].tolist()
    (record,) = measure_coupling(
        model, [prompt], measures=["toy", "depth"], ranks=[2], dtype="float64", progress=False
    )
    assert record.measures == ("depth", "toy") and record.reason is None
    expected = model.trace(prompt).trajectory(4)[1:].mean(dim=1)
    np.testing.assert_allclose(record.toy_means, expected, rtol=1e-5)
    about = {
        "task": "t",
        "doc_id": 0,
        "doc_hash": "d",
        "prompt_hash": "p",
        "prompt_index": 0,
        "weights": "trained",
    }
    (file,) = write_tables(
        [about | record.to_columns()], tmp_path / "out", "2026-01-01", {"model": "m"}
    )
    assert (
        pq.read_schema(file).field("toy_means").metadata[b"description"].startswith(b"mean of x^l")
    )
    np.testing.assert_array_equal(load_records(file)["toy_means"][0], record.toy_means)
    assert summarize({"d": [record]}, (2,))["measures"]["toy"]["mean"] == pytest.approx(
        float(record.toy_means[-1])
    )
    assert registry.recording_option("toy_means") == "coupling_measures=depth+regularity+toy"
    assert "| `toy_means` | `[layer]` | mean of x^l over its coordinates |" in build_page()


def test_a_column_that_was_not_declared_is_refused(toy):
    found = registry.MeasureResult({"toys": 1})
    with pytest.raises(
        CouplingError, match="got column 'toys' of measure toy, expected one of toy_means"
    ):
        registry.registered_measures()["toy"].cast(found)
    with pytest.raises(
        CouplingError, match=r"got toy_means of shape \(\), expected the dimensions \[layer\]"
    ):
        registry.registered_measures()["toy"].cast(registry.MeasureResult({"toy_means": 1.0}))


def test_names_are_unique_and_lead_somewhere():
    everything = [
        reading
        for measure in registry.registered_measures().values()
        for reading in measure.readings
    ]
    assert len({reading.name for reading in everything}) == len(everything)
    fields = {field.name for field in dataclasses.fields(Settings)}
    for measure in registry.registered_measures().values():
        own = {column.name for column in measure.columns}
        assert {reading.column for reading in measure.readings} <= own
        assert set(measure.settings) <= fields - {"measures", "dtype"}
    shared = {column.name for column in registry.JACOBIAN}
    columns = [
        c.name
        for m in registry.registered_measures().values()
        for c in m.columns
        if c.name not in shared
    ]
    common = [column.name for column in (*registry.PROMPT, *registry.OUTCOME)]
    assert len({*columns, *common}) == len(columns) + len(common)


@pytest.mark.parametrize(
    ("column", "option"),
    [
        ("normalized_miscoupling", "coupling_measures=depth+regularity"),
        ("entropy", "coupling_measures=depth+regularity"),
        ("effective_rank", "coupling_measures=depth+regularity+spectra"),
        ("self_miscoupling", "coupling_measures=depth+regularity+self,coupling_tokens=last8"),
        (
            "context_input_miscoupling",
            "coupling_measures=depth+regularity+context,coupling_tokens=last8",
        ),
        ("trajectories", "coupling_trajectories=1"),
        ("nothing", None),
    ],
)
def test_what_to_ask_a_run_for(column, option):
    assert registry.recording_option(column) == option


def test_depths_of_readings():
    record = {
        "window": 3,
        "norms": [1.0, 2.0],
        "step_lengths": [5.0],
        "windowed_line_shape": [1.0, 2.0],
    }
    places = {
        name: registry.readings()[name].in_depth(record, 2)[0].tolist() for name in list(record)[1:]
    }
    assert places == {"norms": [0, 1], "step_lengths": [1], "windowed_line_shape": [1.5, 2.5]}
    depth, value = registry.readings()["expodistance"].in_depth({"expodistance": 4.0}, 2)
    assert np.isnan(depth).tolist() == [True] and value.tolist() == [4.0]


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from lm_eval_coupling.measures import registry; "
        "registry.registered_measures(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
