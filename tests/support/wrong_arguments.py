"""Wrong arguments of every public function; run as a program, it prints those badly refused.

In a process of its own: tests check types as they call, users do not.
"""

import functools
import math
import re
from functools import partial

import cases
import numpy as np
import torch

from lm_eval_coupling import (
    CouplingError,
    ResidualModel,
    chance_level,
    coupling_matrix,
    load_records,
    load_runs,
    measure_coupling,
    miscoupling,
    miscoupling_to,
    run_coupling_hf,
    top_singular,
)
from lm_eval_coupling import block_jacobians as jacobians

ODD = [
    1.5,
    math.nan,
    "x",
    [],
    ["x"],
    {},
    b"x",
    np.float32(1.5),
    torch.tensor(1.5),
    torch.tensor([1.5, 2]),
    object(),
    print,
]
NO_NUMBER = [True, None, *ODD]
NO_FLAG = [None, 2, "no", *ODD]
NO_TEXT = [None, 1, True, *ODD]
NO_PATH = [None, 1, True, *(odd for odd in ODD if not isinstance(odd, str | list))]
NO_TENSOR = [None, 1, "x", [[1.0]], object(), np.array(["x"])]

J = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
FOUND = top_singular(J, 3)
A = coupling_matrix(J, FOUND.U, FOUND.V)


@functools.cache
def model():
    return ResidualModel.wrap(cases.tiny_model("llama", torch.float32))


@functools.cache
def record():
    return measure(prompts=[[1, 2, 3]])[0]


def measure(**given):
    options = {
        "model": model(),
        "prompts": [[1, 2, 3]],
        "ranks": 2,
        "measures": "regularity",
        "progress": False,
    } | given
    return measure_coupling(options.pop("model"), options.pop("prompts"), **options)


def blocks(**given):
    return jacobians(**{"model": model(), "tokens": [1, 2, 3]} | given)


def coupling(rank):
    return record().coupling(rank)


def column(name):
    return record()[name]


def paper(**given):
    options = {
        "model": cases.tiny_model("llama", torch.float32),
        "tokenizer": None,
        "model_name": "m",
        "prompts": [[1, 2]],
        "ranks": [2],
    }
    return run_coupling_hf(**options | given)


def no(function, name, values, words=None):
    return [(function, name, value, words or name) for value in values]


WRONG = [
    *no(blocks, "model", [None, 5, "gpt2", torch.nn.Linear(2, 2)]),
    *no(blocks, "tokens", [None, [], [1.5], [True], [-1], [61], [[1, 2], [3, 4]],
                           {"input_ids": [1]}, b"x"], "token|prompt"),
    *no(blocks, "output_token", [3, -4, *NO_NUMBER], "token"),
    *no(blocks, "input_token", [3, -4, True, *ODD], "token"),
    *no(blocks, "layers", [2, -3, [0, 2], [0.0], [True], "01", True, *ODD]),
    *no(blocks, "method", NO_TEXT),
    *no(blocks, "dtype", [*NO_TEXT, "bfloat16", torch.bfloat16, np.float64]),
    *no(partial(top_singular, k=1), "J",
        [*NO_TENSOR, torch.ones(2), J[0, :2], J.long(), J[..., :0]], "J|matri"),
    *no(partial(top_singular, J), "k", [0, 7, -1, *NO_NUMBER]),
    *no(partial(top_singular, J, 1), "device",
        ["nope", "meta", 5, True, [], "cuda:99"]),
    *no(chance_level, "rank", [0, -1, *NO_NUMBER]),
    *no(miscoupling, "A", [*NO_TENSOR, A[:, :2], A[0, 0], A.long()]),
    *no(partial(miscoupling, A), "normalized", NO_FLAG),
    *no(partial(miscoupling_to, A), "S1", [*NO_TENSOR, FOUND.S[:, :2]]),
    *no(partial(miscoupling_to, A, FOUND.S), "p", [0, -1, True, "x", math.nan]),
    *no(partial(miscoupling_to, A, FOUND.S), "norm", NO_TEXT),
    *no(partial(miscoupling_to, A, FOUND.S), "absolute",
        NO_FLAG),
    *no(partial(coupling_matrix, U2=FOUND.U, V2=FOUND.V), "J1",
        [*NO_TENSOR, J[:, :5, :5], J.double(), J.long(), J[0, 0], torch.ones(3, 6, 6)]),
    *no(measure, "model", [None, 5, "gpt2"]),
    *no(measure, "prompts", [None, 5, [None], [[1.5]], [True], {"a": 1}, {1, 2}, b"ab",
                             {"input_ids": [[1, 2]], "attention_mask": [[1]]}], "prompt"),
    *no(measure, "ranks", [0, -1, 25, *NO_NUMBER]),
    *no(measure, "measures", NO_TEXT),
    *no(measure, "position", NO_NUMBER),
    *no(measure, "dtype", [*NO_TEXT, "float16", torch.bfloat16]),
    *no(measure, "method", NO_TEXT),
    *no(measure, "window", [0, 3, True, *ODD]),
    *no(measure, "tokens", NO_NUMBER),
    *no(measure, "layers", [2, -3, *NO_NUMBER], "layer"),
    *no(measure, "trajectories", NO_FLAG),
    *no(measure, "progress", NO_FLAG),
    *no(coupling, "rank", [3, 2.0, *NO_NUMBER]),
    *no(column, "name", [0, "nope", None], "column"),
    *no(ResidualModel.wrap, "hf_model", [None, 5, "gpt2"], "got"),
    *no(partial(ResidualModel.wrap, None), "tokenizer", ["x", 5, True]),
    *no(load_records, "path", NO_PATH),
    *no(partial(load_records, "."), "newest", NO_FLAG),
    *no(partial(load_records, "."), "columns",
        [5, [5], torch.tensor(1), True]),
    *no(partial(load_records, "."), "weights", NO_TEXT),
    *no(partial(load_records, "."), "places", NO_TEXT),
    *no(load_runs, "paths", [one for one in NO_PATH if not isinstance(one, dict)]),
    *no(partial(load_runs, "."), "newest", NO_FLAG),
    *no(partial(load_runs, "."), "mixed", NO_TEXT),
    *no(partial(load_runs, "."), "facts", NO_PATH[1:]),
    *no(paper, "model_name", [None, 5]),
    *no(paper, "prompts", [None, 5, "one text"]),
    *no(paper, "start", [-1, "x", 1.5, True]),
    *no(paper, "end", [-1, "x", 1.5, True]),
    *no(paper, "save", NO_FLAG),
    *no(paper, "verbose", NO_FLAG),
    *no(paper, "last_layer_norm", NO_FLAG),
    *no(paper, "device", ["nope", 5, True, []]),
    *no(paper, "dtype", NO_TEXT),
    *no(paper, "ranks", [0, "x", True, 1.5, []]),
]  # fmt: skip


def outcome(function, name, value, words):
    """None, or what is wrong with how a wrong argument is met."""
    try:
        function(**{name: value})
    except CouplingError as error:
        told = str(error)
        return None if re.search(words, told) and "\n" not in told and len(told) < 600 else told
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def take_what_was_meant():
    """Whole numbers, flags, arrays and names in all the forms that people have them in."""
    expected = blocks(layers=[1]).jacobians
    for one in (
        1,
        -1,
        np.int64(1),
        torch.tensor(1),
        torch.tensor([1]),
        np.array([1]),
        range(1, 2),
        (i for i in [1]),
    ):
        assert torch.equal(blocks(layers=one).jacobians, expected)
    for last in (2, -1, np.int64(2), torch.tensor(2)):
        assert torch.equal(
            blocks(layers=1, output_token=last, input_token=last).jacobians, expected
        )
    assert blocks(layers=0, dtype="float64").jacobians.dtype == torch.float64
    assert torch.equal(top_singular(J.numpy(), np.int64(3), device="cpu").S, FOUND.S)
    assert torch.equal(coupling_matrix(J.numpy(), FOUND.U.numpy(), FOUND.V.numpy()), A)
    assert torch.equal(miscoupling(A.numpy(), np.bool_(True)), miscoupling(A, True))
    assert chance_level(np.int64(10)) == chance_level(torch.tensor(10)) == chance_level(10)
    for position in (-1, 2, np.int64(-1), torch.tensor(2), "-1", [2]):
        assert (
            measure(position=position, dtype=torch.float32)[0].line_shape_score
            == record().line_shape_score
        )


if __name__ == "__main__":
    for one in WRONG:
        if (found := outcome(*one)) is not None:
            print(f"{one[1]}={one[2]!r}: {found}")
    take_what_was_meant()
