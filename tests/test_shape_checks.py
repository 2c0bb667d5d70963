"""Arrays of every call that a test makes into the package are checked against its annotations."""

import pytest
import torch
from jaxtyping import TypeCheckError

from lm_eval_coupling.numerics import gram


def test_a_shape_that_no_call_could_have_is_refused():
    with pytest.raises(TypeCheckError, match="J"):
        gram.leading_gram_eigenvectors(torch.eye(4), 2)  # without the dimension of the batch
    with pytest.raises(TypeCheckError, match="J"):
        gram.leading_gram_eigenvectors(torch.zeros(1, 4, 3), 2)  # d_model has one size
