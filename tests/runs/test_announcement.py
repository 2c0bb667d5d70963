"""What a user reads before and after measuring."""

import logging

import cases
import numpy as np
import pytest

from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.measuring.prompt import measure_prompt
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.announcement import announce, estimated_seconds
from lm_eval_coupling.runs.closing import closing_lines
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.provenance import about_measurement
from lm_eval_coupling.runs.results import CouplingInfo
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt, Row
from lm_eval_coupling.runs.session import Session, Subject
from lm_eval_coupling.runs.store import MeasurementStore


@pytest.fixture(scope="module")
def model():
    return ResidualModel.wrap(cases.tiny_model("llama"))


@pytest.fixture
def announced(model, caplog, tmp_path):
    def text(documents, quiet=False, **options):
        chosen = Options.parse(ranks="2+4", **options)
        session = Session(
            subjects=[Subject("trained", model)],
            settings=chosen.settings,
            position=chosen.position,
            store=MeasurementStore(tmp_path / "store.sqlite"),
            quiet=quiet,
        )
        with caplog.at_level(logging.INFO, logger="lm_eval.coupling"):
            announce(session, chosen, "org/model", documents)
        return "\n".join(caplog.messages)

    return text


def test_a_run_says_first_what_it_will_do(announced, caplog):
    """Nothing about coupling was said until the scoring was over."""
    text = announced({"arc_easy": 2376, "mmlu": 14042}, limit=100)
    for part in (
        "org/model, 2 blocks of width",
        "depth+regularity at K = 2, 4, in float32",
        "-1 of the prompt, its last",
        "100 of 2376 of arc_easy, 100 of 14042 of mmlu",
        "none; coupling_untrained_seed=0 adds one",
        "store.sqlite",
        "roughly ",
    ):
        assert part in text
    assert len(caplog.messages) == 1


def test_one_process_of_several_announces(announced):
    assert announced({"t": 3}, quiet=True) == ""


def test_many_tasks_and_few_documents(announced):
    many = {f"t{i}": 3 for i in range(60)}
    text = announced(many, limit="all", untrained_seed=7, position=0)
    assert "3 of 3 of t0, " in text and "and of 54 tasks more" in text and "t59" not in text
    assert "fresh weights, seed 7" in text and "0 of the prompt\n" in text


def test_the_estimate_is_of_the_order_of_the_time(model):
    """A tiny model's overhead is larger than its products: the estimate lies below."""
    settings = Settings(ranks=(2,))
    measured = measure_prompt(model, tuple(range(3, 20)), -1, settings)
    assert 0 < estimated_seconds(model, settings) < measured.seconds


CHANCE = chance_coupling(2)


def info(excess, untrained=()):
    """A run whose documents' couplings at K = 2 lie this far above chance."""
    rows = []
    for weights, values in (("trained", excess), ("untrained", untrained)):
        for i, above in enumerate(values):
            pairs = np.full((1, 2, 2), 1 - CHANCE - above, np.float32)
            results = {"depth": MeasureResult({"normalized_miscoupling": pairs})}
            record = PromptCoupling((1, 2), 1, (2,), results)
            key = DocumentKey("t", f"d{i}", f"p{i}")
            prompt = DocumentPrompt(key, i, index=0, kind="text", tokens=(1, 2), text="")
            rows.append(Row(prompt, weights, record))
    facts = about_measurement(rows, ["t"], [2]) | {"reused": 0, "interrupted": False}
    return CouplingInfo(facts, rows)


@pytest.mark.parametrize(
    ("excess", "verdict"),
    [
        ([0.01, -0.01, 0.02, -0.01], "not distinguishable from chance"),
        ([0.05, 0.10], "not distinguishable from chance"),
        ([0.007, 0.008, 0.009, 0.008], "0.0080 above chance: barely above chance"),
        ([0.05, 0.06, 0.05, 0.06], "0.0550 above chance: weakly coupled"),
        ([0.2, 0.3, 0.2, 0.3], "0.2500 above chance: clearly coupled"),
        ([-0.1, -0.11, -0.1, -0.11], "0.1050 below chance"),
    ],
)
def test_a_run_ends_with_a_verdict(excess, verdict):
    lines = closing_lines(info(excess), {}).splitlines()
    (line,) = [line for line in lines if line.startswith("In all: ")]
    mean = CHANCE + np.mean(excess)
    assert line.startswith(f"In all: {mean:.4f} ± ") and f" over {len(excess)} documents, " in line
    assert line.endswith(verdict) and len(line) <= 100


def test_a_twin_has_a_verdict_of_its_own():
    text = closing_lines(info([0.2, 0.3, 0.2], [0.01, -0.01, 0.0]), {})
    twin = f"Untrained twin: {CHANCE:.4f} ± 0.0058 over 3 documents, not distinguishable"
    assert twin in text
    assert "In all" not in closing_lines(info([0.2]), {})
