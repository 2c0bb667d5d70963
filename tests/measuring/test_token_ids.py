"""Prompts in every form: one string, and the output of a tokenizer, among them."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measuring.token_ids import token_ids


class Model:
    @staticmethod
    def encode(prompt):
        return [1, *map(int, prompt.split())] if isinstance(prompt, str) else [*prompt.shape]


IDS, MASK = [[0, 5, 6], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("5 6", [[1, 5, 6]]),
        (["5 6", "7"], [[1, 5, 6], [1, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (([5, 6], "7"), [[5, 6], [1, 7]]),
        ([5, 6], [[5, 6]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (torch.tensor(IDS), IDS),
        (np.array(IDS), IDS),
        ([torch.tensor([5, 6]), torch.tensor([[7]])], [[5, 6], [7]]),
        ([torch.tensor(5), torch.tensor(6)], [[5, 6]]),
        (BatchEncoding({"input_ids": IDS, "attention_mask": MASK}), [[5, 6], [7, 8, 9]]),
        (
            BatchEncoding({"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}),
            [[5, 6], [7, 8, 9]],
        ),
        (BatchEncoding({"input_ids": [5, 6], "attention_mask": [1, 1]}), [[5, 6]]),
        ({"input_ids": IDS}, IDS),
        (torch.zeros(3, 4, 5), [[3, 4, 5]]),
        (torch.zeros(2, 3, 4, 5), [[3, 4, 5]] * 2),
        ([torch.zeros(3, 4, 5), "7"], [[3, 4, 5], [1, 7]]),
        ([], []),
        ([[]], [[]]),
        ((text for text in ["5", "6"]), [[1, 5], [1, 6]]),
    ],
)
def test_every_form(prompts, expected):
    assert token_ids(Model, prompts) == expected


def test_what_is_encoded_already_is_kept():
    class Encoded(tuple):
        image = "of an image"

    (found,) = token_ids(Model, [Encoded((3, 4))])
    assert found.image == "of an image" and list(found) == [3, 4]


@pytest.mark.parametrize(
    "prompts",
    [
        7,
        None,
        [None],
        [1.5, 2.5],
        [[1.5]],
        [[True]],
        torch.tensor([0.5]),
        [["5", "6"]],
        {"attention_mask": MASK},
        [{"input_ids": [1]}],
    ],
)
def test_anything_else_is_refused(prompts):
    with pytest.raises(CouplingError, match="expected .*texts or token ids"):
        token_ids(Model, prompts)
