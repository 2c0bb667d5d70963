"""Several tokens of a prompt: a record each, and the headline is of the first."""

import cases
import numpy as np
import pytest
from wrapping import wrapped_on

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.choices import chosen_positions, positions_at_most
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.measuring.settings import Settings
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
