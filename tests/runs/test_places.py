"""Several tokens of a prompt: a record each, and the headline is of the first."""

import cases
import numpy as np
import pytest
import torch
from wrapping import wrapped_on

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.choices import chosen_positions, positions_at_most
from lm_eval_coupling.measuring import batch as batch_module
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.tracing import Tracer
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt, document_couplings
from lm_eval_coupling.runs.run import measure_documents
from lm_eval_coupling.runs.session import Session, Subject
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.records import load_records
from lm_eval_coupling.saved.tables import write_tables

PROMPTS = [tuple(cases.tiny_tokens(seq)[0].tolist()) for seq in (3, 6)]


@pytest.fixture(scope="module")
def model(float64_device):
    return wrapped_on(float64_device, cases.tiny_model("llama"))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (-1, [-1]),
        ("-1+0+last4", [-1, 0, 2, 3, 4]),  # the last token is there already
        ("first2+-1", [0, 1, -1]),
        ("0+5", [0, 5]),
        ("last9", [0, 1, 2, 3, 4, 5]),
        ("[-1,0]", [-1, 0]),
    ],
)
def test_tokens_in_the_order_asked_for(choice, expected):
    assert chosen_positions(choice, 6) == expected


def test_random_tokens_are_of_the_prompts_length():
    assert positions_at_most("random8") == 8 and positions_at_most("-1+0+last4") == 5
    assert chosen_positions("random8", 50) == chosen_positions("random8", 50)
    assert (
        len(set(chosen_positions("random8", 50))) == 8 and len(chosen_positions("random8", 5)) == 5
    )
    with pytest.raises(
        CouplingError, match="got coupling_position=mostly, expected a token such as -1"
    ):
        chosen_positions("-1+mostly", 6)


def test_a_record_for_each(model):
    options = {"ranks": (2,), "dtype": "float64", "progress": False}
    found = measure_coupling(model, PROMPTS, position="-1+0+4", **options)
    assert [(record.tokens, record.position) for record in found] == [
        *((PROMPTS[0], at) for at in (2, 0, 4)),
        *((PROMPTS[1], at) for at in (5, 0, 4)),
    ]
    assert [record.reason_codes for record in found] == [(), (), ("no_such_token",), (), (), ()]
    for record in found:
        if record.reason is None:
            (alone,) = measure_coupling(model, [record.tokens], position=record.position, **options)
            np.testing.assert_allclose(record.singular_values, alone.singular_values, rtol=1e-5)
            np.testing.assert_allclose(record.norms, alone.norms, rtol=1e-6)


def test_a_run_keeps_them_apart(model, tmp_path):
    """From the session to the table: values of the run are of the first token, the others are there
    for who asks.
    """
    with MeasurementStore(tmp_path / "store.sqlite") as store:
        session = Session(
            subjects=[Subject("trained", model)],
            settings=Settings((2,), ("depth",), "float64"),
            position="-1+first4",
            store=store,
            quiet=True,
        )
        prompts = [
            DocumentPrompt(
                DocumentKey("task", f"d{i}", f"p{i}"), i, 0, "context", tokens=tokens, text="text"
            )
            for i, tokens in enumerate(PROMPTS)
        ]
        rows = measure_documents(session, prompts).rows
        assert len(store) == len(rows) == 3 + 5  # the third token of three is the last
    assert [row.measured.position for row in rows if row.place == 0] == [2, 5]
    values = document_couplings(rows, 2)
    assert list(values.values()) == [row.measured.coupling(2) for row in rows if row.place == 0]
    write_tables([row.to_columns() for row in rows], tmp_path / "out", "2026-01-01", {"model": "m"})
    assert load_records(tmp_path / "out")["position"].tolist() == [2, 5]
    everything = load_records(tmp_path / "out", places="all", columns=["position", "place"])
    assert sorted(zip(everything["position"], everything["place"], strict=True)) == sorted(
        (row.measured.position, row.place) for row in rows
    )
    assert "place" not in load_records(tmp_path / "out", columns=["position"])
    with pytest.raises(CouplingError, match="got places='some', expected one of first, all"):
        load_records(tmp_path / "out", places="some")


@pytest.mark.parametrize(
    ("given", "position", "told"),
    [
        (-1, -1, {"position": -1}),
        (-2.0, -2, {"position": -2}),
        ("-1", -1, {"position": -1}),
        ("-1+0+last4", "-1+0+last4", {"position": -1, "positions": "-1+0+last4"}),
        ([-1, 0], "-1+0", {"position": -1, "positions": "-1+0"}),
        ("random8", "random8", {"position": "random8", "positions": "random8"}),
    ],
)
def test_the_argument_as_lm_eval_hands_it_over(given, position, told):
    options = Options.parse(position=given)
    assert options.position == position
    assert {
        name: value for name, value in options.as_dict().items() if name.startswith("position")
    } == told


@pytest.mark.parametrize("given", ["", "last", "-1+some", 0.5])
def test_an_argument_that_cannot_be_read(given):
    with pytest.raises(CouplingError, match="coupling_position"):
        Options.parse(position=given)


LONG = [tuple(cases.tiny_tokens(seq)[0].tolist()) for seq in (5, 9, 30)]
SEVERAL = "-1+0+first4"


def run_of(model, store, position, prompts=LONG, measures=("depth", "regularity", "geometry")):
    session = Session(
        subjects=[Subject("trained", model)],
        settings=Settings((2,), measures),
        position=position,
        store=store,
        quiet=True,
    )
    documents = [
        DocumentPrompt(
            DocumentKey("task", f"d{i}", f"p{i}"), i, 0, "context", tokens=tokens, text="text"
        )
        for i, tokens in enumerate(prompts)
    ]
    return measure_documents(session, documents)


@pytest.fixture
def texts_traced(monkeypatch):
    """Lengths of the texts of every forward pass, trials of the model apart."""
    passes = []
    right = Tracer.run

    def counted(self, prompts, dtype, output_tokens=None, *rest, **options):
        counted_here = []
        table = self.model.get_input_embeddings()
        hook = table.register_forward_hook(lambda m, ids, out: counted_here.append(len(ids[0])))
        try:
            traces = right(self, prompts, dtype, output_tokens, *rest, **options)
        finally:
            hook.remove()
        if output_tokens is not None:
            passes.extend(counted_here)
        return traces

    monkeypatch.setattr(Tracer, "run", counted)
    return passes


@pytest.mark.parametrize("pads", [True, False])
def test_a_text_takes_one_forward_pass_whatever_the_number_of_its_tokens(
    tmp_path, texts_traced, pads
):
    """Each token had a pass of its own: five of them for every document."""
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    measure_coupling(
        model, [[1, 2], [3, 4, 5]], ranks=2, progress=False
    )  # has the trials behind it
    model.tracer.pads = pads
    texts_traced.clear()
    with MeasurementStore(tmp_path / "store.sqlite") as store:
        rows = run_of(model, store, SEVERAL).rows
        assert len(rows) == 3 * 5 and all(row.measured.coupling(2) > 0 for row in rows)
        assert sum(texts_traced) == len(LONG) and len(texts_traced) == (1 if pads else 3)
        run_of(model, store, SEVERAL)
        assert sum(texts_traced) == len(LONG)  # all from the store
    texts_traced.clear()
    measure_coupling(model, LONG, ranks=2, position=SEVERAL, progress=False)
    assert sum(texts_traced) == len(LONG)


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon-alibi", "qwen3-next"])
@pytest.mark.parametrize(
    "lengths", [(5, 9, 30), (3, 4)], ids=["decoded", "pulled back in the pass"]
)
def test_values_are_those_of_each_token_measured_alone_to_the_last_bit(case, lengths, tmp_path):
    """Pullbacks of few tokens of short prompts are taken in the pass, one after the other."""
    model = ResidualModel.wrap(cases.tiny_model(case))
    prompts = [tuple(cases.tiny_tokens(seq)[0].tolist()) for seq in lengths]
    with MeasurementStore(tmp_path / "all.sqlite") as store:
        together = run_of(model, store, "-1+0+1", prompts).rows
    alone = []
    for place in ("-1", "0", "1"):
        with MeasurementStore(tmp_path / f"{place}.sqlite") as store:
            alone += run_of(model, store, place, prompts).rows
    assert len(together) == len(alone) == 3 * len(prompts)
    of = {(row.document, row.measured.position): row.measured for row in alone}
    for row in together:
        one = of[row.document, row.measured.position].to_columns()
        for name, value in row.measured.to_columns().items():
            if name == "certificate" and len(lengths) == 3:
                np.testing.assert_allclose(value, one[name], atol=1e-6)
            elif name != "seconds":
                np.testing.assert_array_equal(value, one[name], err_msg=name)


def test_a_token_that_fails_costs_the_others_of_its_text_nothing(tmp_path, monkeypatch):
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    right = batch_module.jacobians_of_traces

    def failing(traces, positions, *rest):
        if 0 in positions:
            raise torch.OutOfMemoryError("out of memory")
        return right(traces, positions, *rest)

    monkeypatch.setattr(batch_module, "jacobians_of_traces", failing)
    with MeasurementStore(tmp_path / "store.sqlite") as store:
        rows = run_of(model, store, "0+-1+1", measures=("depth",)).rows
    assert len(rows) == 9
    for row in rows:
        expected = "out of memory" if row.measured.position == 0 else None
        assert row.measured.reason == expected


def test_what_is_measured_before_ctrl_c_is_kept_token_by_token(tmp_path, monkeypatch):
    model, calls = ResidualModel.wrap(cases.tiny_model("llama")), []
    right = batch_module.jacobians_of_traces

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(batch_module, "jacobians_of_traces", interrupted)
    with MeasurementStore(tmp_path / "store.sqlite") as store:
        run = run_of(model, store, SEVERAL, measures=("depth",))
        assert run.interrupted and len(run.rows) == len(store) == 6  # two tokens of three texts
        assert {row.place for row in run.rows} == {0, 1}
