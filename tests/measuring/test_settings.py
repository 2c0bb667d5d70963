"""Settings: values that cannot work are refused; values that matter tell measurements apart."""

import json

import cases
import numpy as np
import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.levels import LEVELS
from lm_eval_coupling.jacobians.methods import METHODS
from lm_eval_coupling.measures import registry
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.measuring.settings import Settings, chosen_ranks
from lm_eval_coupling.residual import ResidualModel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": ()}, "expected positive whole numbers"),
        ({"ranks": (0, 3)}, "coupling_ranks=0.3, expected positive whole numbers"),
        ({"ranks": (True, 2)}, "coupling_ranks=True.2, expected positive whole numbers"),
        ({"ranks": 2.5}, "coupling_ranks=2.5, expected positive whole numbers"),
        ({"ranks": "ten"}, "coupling_ranks=ten, expected positive whole numbers"),
        (
            {"ranks": (2, 25)},
            "coupling_ranks=2.25, rank 25 for a model with d_model = 24; "
            "choose ranks of at most 24",
        ),
        (
            {"measures": ("depth", "width")},
            "coupling_measures=depth.width .*'width', expected any of depth, regularity",
        ),
        ({"measures": ()}, "no coupling_measures, expected any of depth, regularity"),
        ({"dtype": "bfloat16"}, "coupling_dtype='bfloat16', expected one of float32, float64"),
        ({"method": "fast"}, "coupling_method='fast', expected one of auto, closed"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(options, message):
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    with pytest.raises(CouplingError, match=message):
        measure_coupling(model, [[1, 2, 3]], progress=False, **options)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (2, (2,)),
        ("5+2", (2, 5)),
        (np.array([2, 5]), (2, 5)),
        (np.int64(3), (3,)),
        ([5, 2, 5], (2, 5)),
    ],
)
def test_ranks_in_every_form(ranks, expected):
    """A single number, a text and NumPy's numbers are ranks."""
    assert chosen_ranks(ranks) == expected


def test_settings_are_json_and_tell_measurements_apart():
    base = Settings((2, 5))
    assert json.loads(json.dumps(base.as_dict())) == base.as_dict()
    assert Settings((5, 2, 5)).as_dict() == base.as_dict()
    others = [
        Settings((2,)),
        Settings((2, 5), ("depth",)),
        Settings((2, 5), dtype="float64"),
        Settings((2, 5), method="closed"),
    ]
    assert len({json.dumps(s.as_dict()) for s in [base, *others]}) == 5


def test_what_a_measure_depends_on_is_its_own():
    """Depth numbers are found again whatever is asked for beside them, in whatever order."""
    assert Settings(measures=("depth",)).for_measure("depth") == {
        "dtype": "float32",
        "ranks": [10, 30, 50],
        "method": "auto",
        "version": registry.registered_measures()["depth"].version,
    }
    one, other = (
        Settings(measures=("depth", "regularity")),
        Settings(measures=("regularity", "depth"), window=5),
    )
    assert one.measures == other.measures and one.for_measure("depth") == other.for_measure("depth")
    assert one.for_measure("regularity") != other.for_measure("regularity")
    assert other.as_dict()["window"] == 5 and other.as_dict()["regularity_version"] == 2


def test_levels_are_those_of_the_jacobians():
    assert METHODS == ("auto", *LEVELS)
