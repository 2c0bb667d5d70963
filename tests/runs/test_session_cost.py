"""What a session says of the cost, and what looks like progress."""

import logging
import threading

import cases
import pytest
from tqdm.auto import tqdm

from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs import session as sessions
from lm_eval_coupling.runs.session import Session, Spot, Subject
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED

PROMPTS = [Spot.at(tuple(cases.tiny_tokens(n)[0].tolist()), -1) for n in (5, 9, 7)]


@pytest.fixture(scope="module")
def model():
    return ResidualModel.wrap(cases.tiny_model("llama"))


@pytest.fixture
def make(model, tmp_path):
    def made(weights=(TRAINED,), **settings):
        subjects = [Subject(name, model) for name in weights]
        settings = Settings(ranks=(2,), **{"measures": ("depth", "regularity"), **settings})
        store = MeasurementStore(tmp_path / "store.sqlite")
        return Session(subjects=subjects, settings=settings, position=-1, store=store)

    return made


def test_equal_prompts_are_one_and_found_again(make):
    first = make().measure([*PROMPTS, PROMPTS[0]])
    assert set(first.of(TRAINED)) == set(PROMPTS) and first.reused == {TRAINED: set()}
    assert len(make().store) == 2 * len(PROMPTS)  # measures
    again = make().measure(PROMPTS[:2])
    assert again.reused == {TRAINED: set(PROMPTS[:2])}
    for tokens in PROMPTS[:2]:
        assert again.of(TRAINED)[tokens].coupling(2) == first.of(TRAINED)[tokens].coupling(2)


def test_what_is_known_does_not_look_like_progress(make, monkeypatch):
    """The bar jumped ahead for prompts that the store had, and its remaining time was wrong by as
    much.
    """
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(sessions, "tqdm", Bar)
    make().measure(PROMPTS[:1])
    make().measure([*PROMPTS, *PROMPTS])
    assert [(bar.total, bar.initial, bar.n) for bar in bars] == [(1, 0, 1), (2, 0, 2)]


def test_the_cost_is_told_after_a_first_prompt(make, caplog, monkeypatch):
    seen = []
    right = sessions.measure_prompts

    def watched(model, batch, *rest):
        seen.append((len(batch), len(caplog.messages)))
        return right(model, batch, *rest)

    monkeypatch.setattr(sessions, "measure_prompts", watched)
    with caplog.at_level(logging.INFO):
        make(measures=("depth", "self"), layers="all", tokens="all").measure([*PROMPTS, PROMPTS[1]])
    counted, memory, cost = caplog.messages
    assert counted == "coupling: on this process 4 prompts, 3 of them distinct, 0 measured before"
    assert "of Jacobians on the host" in memory
    assert (
        cost.startswith("coupling: a first prompt of 7 tokens took ")
        and "; the other 2 take up to " in cost
    )
    assert "depth " in cost and "self " in cost and "more Jacobians" in cost
    assert seen[0] == (1, 2) and sum(size for size, _ in seen) == 3 and seen[1][1] == 3


def test_trying_one_measures_one_of_each_weights(make):
    told = make(weights=(TRAINED, UNTRAINED)).try_one(PROMPTS)
    assert told[0] == "trained weights: 3 prompts, 3 of them distinct, 0 measured before"
    assert "; the other 2 take up to " in told[1]
    assert (
        told[3] == "untrained weights: 3 prompts, 3 of them distinct, 1 measured before"
    )  # here they are the same weights
    assert "; the other 1 take up to " in told[4] and len(told) == 6
    assert len(make().store) == 2 * 2  # measures of two prompts
    assert PROMPTS[2] in make().measure(PROMPTS).reused[TRAINED]


def test_another_thread_stores_and_finds(make, caplog):
    """SQLite refuses a connection of another thread: nothing was stored, with two warnings a
    prompt.
    """
    session, found = make(), []
    thread = threading.Thread(target=lambda: found.append(session.measure(PROMPTS)))
    thread.start()
    thread.join()
    assert len(session.store) == 2 * len(PROMPTS) and not [
        r for r in caplog.records if r.levelno >= logging.WARNING
    ]
    assert session.measure(PROMPTS).reused == {TRAINED: set(PROMPTS)}
    session.store.close()
