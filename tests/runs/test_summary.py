"""From prompts to a task's numbers, against values worked out by hand."""

import json
import math

import numpy as np
import pytest

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.headline import headline_rank
from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.runs.task_summary import document_value, summarize

NAN = math.nan
PAIR_MEASURES = (
    "normalized_miscoupling",
    "miscoupling",
    "miscoupling_to",
    "miscoupling_to_absolute",
    "miscoupling_to_trace",
)
CODES = {"out of memory": "out_of_memory", "the Jacobian is off": "certificate", "?": "error"}


def prompt(off_diagonal, diagonal=0.0, line_shape_score=NAN, expodistance=NAN, reason=None):
    """Two layers; at each rank all five kinds have the same values: [[diagonal, first], [second,
    diagonal]].
    """
    arrays = {}
    if off_diagonal is not None:
        pairs = np.array(
            [[[diagonal, first], [second, diagonal]] for first, second in off_diagonal],
            dtype=np.float32,
        )
        arrays = {name: pairs * (i + 1) for i, name in enumerate(PAIR_MEASURES)}
    scores = {"line_shape_score": line_shape_score, "expodistance": expodistance}
    regular = {name: value for name, value in scores.items() if not math.isnan(value)}
    reasons = () if reason is None else (Reason(CODES[reason], reason),)
    found = {"depth": MeasureResult(arrays, reasons), "regularity": MeasureResult(regular)}
    return PromptCoupling(tokens=(1, 2), position=1, ranks=(4, 8), results=found)


@pytest.mark.parametrize(
    ("ranks", "expected"), [((10, 30, 50), 10), ((4, 10), 10), ((30, 50), 30), ((8, 4), 4)]
)
def test_the_headline_is_rank_ten_where_it_was_measured(ranks, expected):
    assert headline_rank(ranks) == expected


def test_mean_and_standard_error():
    found = mean_and_error([1.0, NAN, 2.0, 6.0])
    assert found == pytest.approx({"mean": 3.0, "stderr": math.sqrt(7 / 3), "n": 3})
    one = mean_and_error(iter([NAN, 5.0]))
    assert (one["mean"], one["n"]) == (5.0, 1) and math.isnan(one["stderr"])
    none = mean_and_error([NAN])
    assert none["n"] == 0 and math.isnan(none["mean"]) and math.isnan(none["stderr"])


def test_a_document_is_worth_the_mean_of_its_prompts():
    first, second = prompt([(0.2, 0.4), (0.5, 0.7)]), prompt([(0.6, 0.8), (0.1, 0.1)])
    assert document_value([first], 4) == pytest.approx(0.7)
    assert document_value([first, second], 4) == pytest.approx((0.7 + 0.3) / 2)
    assert document_value([first, second], 8) == pytest.approx((0.4 + 0.9) / 2)
    assert math.isnan(document_value([prompt(None)], 4)) and math.isnan(document_value([], 4))


def test_a_document_of_which_a_prompt_failed_has_no_value():
    """The mean over the other contexts was taken for the document's, and it counted as measured."""
    first, failed = prompt([(0.2, 0.4), (0.5, 0.7)], expodistance=1.0), prompt(None)
    assert math.isnan(document_value([first, failed], 4))
    documents = {"whole": [first, first], "partial": [first, failed]}
    summary = summarize(documents, (4, 8))
    assert (summary["measured"], summary["failed"]) == (1, 1)
    assert summary["measures"]["coupling"][4] == pytest.approx(
        {"mean": 0.7, "stderr": NAN, "n": 1}, nan_ok=True
    )
    assert summary["measures"]["expodistance"]["n"] == 1


def test_documents_count_once_however_many_prompts_they_have():
    """Three prompts of one document and one of another: 0.5·(mean of three + one), not the mean of
    four.
    """
    group = [
        prompt([(m, m), (0, 0)], line_shape_score=s)
        for m, s in ((0.1, 1.0), (0.2, 2.0), (0.3, 6.0))
    ]
    found = summarize(
        {"one": group, "two": [prompt([(0.8, 0.8), (0, 0)], line_shape_score=5.0)]}, (4, 8)
    )
    coupling = found["measures"]["coupling"][4]
    assert coupling["mean"] == pytest.approx((0.8 + 0.2) / 2)
    assert coupling["stderr"] == pytest.approx(0.3)  # |0.8 − 0.2| / 2
    assert coupling["n"] == 2 and (found["measured"], found["failed"]) == (2, 0)
    assert found["measures"]["line_shape_score"]["mean"] == pytest.approx((3 + 5) / 2)


def test_every_measure_at_every_rank():
    found = summarize(
        {"one": [prompt([(0.2, 0.4), (0.5, 0.7)], diagonal=0.1, expodistance=2.5)]}, (4, 8)
    )["measures"]
    for i, name in enumerate(PAIR_MEASURES):
        assert found[name][4]["mean"] == pytest.approx(0.3 * (i + 1))
        assert found[name][8]["mean"] == pytest.approx(0.6 * (i + 1))
    assert found["coupling"][4]["mean"] == pytest.approx(1 - 0.3)
    assert found["coupling_with_diagonal"][4]["mean"] == pytest.approx(
        1 - (0.2 + 0.4 + 0.1 + 0.1) / 4
    )
    assert found["coupling_with_diagonal"][8]["mean"] == pytest.approx(
        1 - (0.5 + 0.7 + 0.1 + 0.1) / 4
    )
    assert found["expodistance"] == pytest.approx({"mean": 2.5, "stderr": NAN, "n": 1}, nan_ok=True)
    of_jacobians = {
        "mean_jacobian_norm",
        "mean_jacobian_frobenius",
        "mean_stable_rank",
        "mean_non_normality",
    }
    of_jacobians |= {"mean_symmetric_share", "middle_over_outer_norm"}
    of_the_trajectory = {"line_shape_score", "expodistance", "equidistance"}
    assert set(found) == {
        "coupling",
        "coupling_with_diagonal",
        "rotated",
        "one_pair",
        *PAIR_MEASURES,
        *of_jacobians,
        *of_the_trajectory,
    }


def test_undefined_pairs_are_left_out():
    found = summarize({"one": [prompt([(0.2, NAN), (NAN, NAN)], diagonal=NAN)]}, (4, 8))["measures"]
    assert found["coupling"][4]["mean"] == pytest.approx(0.8)
    assert found["miscoupling"][4]["mean"] == pytest.approx(0.4)
    assert found["coupling"][8]["n"] == found["miscoupling"][8]["n"] == 0


def test_failures_are_counted_by_document_and_their_reasons_by_prompt():
    bad = prompt(None, reason="out of memory")
    documents = {
        "measured": [prompt([(0.2, 0.2), (0.2, 0.2)])],
        "in part": [prompt([(0.4, 0.4), (0.4, 0.4)]), bad],
        "trajectory only": [prompt(None, line_shape_score=1.5, reason="the Jacobian is off")],
        "failed": [bad, bad],
        "without prompt": [],
    }
    found = summarize(documents, (4, 8))
    assert (found["measured"], found["failed"]) == (2, 3)
    assert found["reasons"] == {"out of memory": 3, "the Jacobian is off": 1}
    assert found["reason_codes"] == {"out_of_memory": 3, "certificate": 1}
    coupling = found["measures"]["coupling"][4]
    assert coupling == pytest.approx({"mean": 0.8, "stderr": NAN, "n": 1}, nan_ok=True)
    assert found["measures"]["line_shape_score"]["n"] == 1


def test_the_summary_is_json():
    found = summarize(
        {"one": [prompt([(0.2, 0.4), (0.5, 0.7)])], "two": [prompt(None, reason="?")]}, (4, 8)
    )
    assert json.loads(json.dumps(found))["measures"]["coupling"]["4"]["mean"] == pytest.approx(0.7)
