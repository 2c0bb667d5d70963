"""What is written as JSON is read by every parser: no NaN, no infinity, nothing that is no JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from lm_eval_coupling.saved.strict_json import strict


def test_what_is_not_finite_is_null_however_deep_it_lies():
    actual = strict({"a": [math.nan, {"b": (np.float32("inf"), -math.inf)}], 10: np.nan})
    assert json.loads(json.dumps(actual, allow_nan=False)) == {
        "a": [None, {"b": [None, None]}],
        "10": None,
    }


def test_what_is_finite_stays_what_it_is():
    given = {"one": 1, "half": 0.5, "yes": True, "none": None, "text": "π"}
    assert strict(given) == given and strict(np.int64(3)) == 3 and strict(np.bool_(True)) is True
    assert strict(Path("a")) == "a"


def test_numbers_may_be_shortened_and_counts_are_not_numbers():
    assert strict([1 / 3, 12345678, True], lambda x: round(x, 2)) == [0.33, 12345678, True]
