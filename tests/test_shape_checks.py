"""Arrays of every call that a test makes into the package are checked against its annotations."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shape_checks import checked

from lm_eval_coupling.numerics import gram


def test_a_shape_that_no_call_could_have_is_refused():
    with pytest.raises(TypeCheckError, match="J"):
        gram.leading_gram_eigenvectors(torch.eye(4), 2)  # without the dimension of the batch
    with pytest.raises(TypeCheckError, match="J"):
        gram.leading_gram_eigenvectors(torch.zeros(1, 4, 3), 2)  # d_model has one size


def test_a_shape_is_refused_after_right_ones():
    for _ in range(2):
        gram.leading_gram_eigenvectors(torch.eye(4)[None], 2)
    with pytest.raises(TypeCheckError, match="J"):
        gram.leading_gram_eigenvectors(torch.zeros(1, 4, 3), 2)


def test_every_result_is_checked():
    """Of arguments that have passed before, a result of another shape has not."""
    results = [torch.ones(3), torch.ones(3), torch.ones(4), torch.ones(3, 1)]

    @checked
    def next_result(x: Float[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        return results.pop(0)

    assert len(next_result(torch.ones(3))) == len(next_result(torch.ones(3))) == 3
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="return value"):
            next_result(torch.ones(3))


def test_fields_of_a_dataclass_are_checked():
    @checked
    @dataclass
    class Pair:
        x: Float[torch.Tensor, " n"]
        y: list[Float[torch.Tensor, " n"]]

    for _ in range(2):
        assert len(Pair(torch.ones(2), [torch.ones(2)]).y) == 1
    for y in ([torch.ones(3)], [torch.ones(2, 1)], torch.ones(2)):
        with pytest.raises(TypeCheckError):
            Pair(torch.ones(2), y)
