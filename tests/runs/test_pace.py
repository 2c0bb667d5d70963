"""The pace of measuring and the load of the machine, with clocks that a test sets."""

import logging
import os

import cases
import pytest

from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs import session as sessions
from lm_eval_coupling.runs.cost import Pace
from lm_eval_coupling.runs.session import Session, Spot, Subject
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.tables import TRAINED


class Machine:
    """Clocks and load of a machine of two cores."""

    def __init__(self, monkeypatch, load=1.0):
        self.wall = self.cpu = 0.0
        self.load = load
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(variable, raising=False)

    def pace(self, cores=2):
        return Pace(cores, wall=lambda: self.wall, cpu=lambda: self.cpu, load=lambda: self.load)

    def run(self, pace, prompts, wall, cpu):
        self.wall += wall
        self.cpu += cpu
        pace.add(prompts)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_the_first_batch_counts_until_there_is_another(machine):
    pace = machine.pace()
    machine.run(pace, 1, 30.0, 60.0)
    assert pace.seconds == 30.0
    machine.run(pace, 8, 16.0, 32.0)
    assert pace.seconds == 2.0


def test_one_slow_batch_does_not_move_the_pace_and_old_ones_are_forgotten(machine):
    pace = machine.pace()
    for wall in (30.0, 8.0, 8.0, 800.0, 8.0):
        machine.run(pace, 8, wall, 2 * wall)
    assert pace.seconds == 1.0
    for _ in range(20):
        machine.run(pace, 8, 24.0, 48.0)
    assert pace.seconds == 3.0


def test_a_busy_machine_is_named_once(machine):
    pace = machine.pace()
    machine.load = 6.4
    machine.run(pace, 1, 20.0, 8.0)
    words = pace.slowed_by()
    assert words.startswith("the machine is busy: 6 processes want its 2 cores, and measuring got ")
    assert "got 0.4 of the 2 that it may use; GOMP_SPINCOUNT=10000 in the environment" in words
    machine.run(pace, 8, 20.0, 8.0)
    assert pace.slowed_by() is None


def test_no_remedy_is_named_to_who_took_it(machine, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    pace = machine.pace()
    machine.load = 6.4
    machine.run(pace, 1, 20.0, 8.0)
    assert pace.slowed_by().endswith("got 0.4 of the 2 that it may use")


@pytest.mark.parametrize(
    ("load", "cpu"),
    [
        (6.0, 1.4),  # it gets most of its cores all the same
        (1.5, 0.4),  # nobody else works: its own steps take one core
        (None, 0.4),  # the system does not count
    ],
)
def test_a_machine_that_is_not_known_to_be_busy_is_not_called_so(machine, load, cpu):
    pace = machine.pace()
    machine.load = load
    machine.run(pace, 8, 20.0, cpu * 20.0)
    assert pace.slowed_by() is None


def test_the_first_seconds_do_not_show_it(machine):
    pace = machine.pace()
    machine.load = 6.0
    machine.run(pace, 1, 3.0, 0.5)
    assert pace.slowed_by() is None


def test_a_session_says_the_time_left_and_that_the_machine_is_busy(
    machine, monkeypatch, tmp_path, caplog
):
    """Ten prompts take 20 s for the first and 3 s for each other, at a third of the two cores."""
    bars, model = [], ResidualModel.wrap(cases.tiny_model("llama"))

    class Bar(sessions.tqdm):
        def set_postfix_str(self, text="", refresh=True):
            bars.append(text)

    right = sessions.measure_prompts

    def slow(model, batch, *rest):
        seconds = 3.0 * len(batch) if bars else 20.0
        machine.wall += seconds
        machine.cpu += 0.6 * seconds
        return right(model, batch, *rest)

    machine.load = 7.0
    monkeypatch.setattr(sessions, "tqdm", Bar)
    monkeypatch.setattr(sessions, "Pace", lambda cores: machine.pace())
    monkeypatch.setattr(sessions, "measure_prompts", slow)
    prompts = [Spot.at((3, 4, 5, 6 + n), -1) for n in range(10)]
    store = MeasurementStore(tmp_path / "store.sqlite")
    session = Session([Subject(TRAINED, model)], Settings(ranks=(2,)), position=-1, store=store)
    with caplog.at_level(logging.INFO, logger="lm_eval.coupling"):
        session.measure(prompts)
    assert bars == ["3 min left", "24.0 s left", "0.0 s left"]  # batches of 1, 1 and 8
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("coupling: the machine is busy: 7 processes want its 2 cores")
    (pace,) = [text for text in caplog.messages if "the next prompts took" in text]
    assert pace == "coupling: the next prompts took 3.0 s each; 24.0 s left"
