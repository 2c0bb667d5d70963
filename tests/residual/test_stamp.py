"""The entries of a weight that a stamp looks at."""

import pytest

from lm_eval_coupling.residual.stamp import SAMPLE, _spread


@pytest.mark.parametrize("size", [1, 2, SAMPLE, 1000, 49152 * 576, 262144 * 640, 2**35 + 1])
def test_entries_are_within_the_weight_whatever_its_size(size):
    """Places in float32 were rounded past the end of weights with more than 2^24 entries."""
    places = _spread(size).tolist()
    assert (
        places[0] == 0
        and places[-1] == size - 1
        and len({*places}) == len(places) == min(SAMPLE, size)
    )
    assert places == sorted(places)
