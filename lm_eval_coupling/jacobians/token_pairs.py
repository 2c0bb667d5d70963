"""Jacobians J_{t1 t2} of one block for many pairs of tokens, each certified like a single one.

Pairs of one token, t1 = t2, go through the closed level together. Pairs that share their output
token share the part of the block after its attention core, and one backward pass certifies all of
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.autodiff import autodiff_row
from lm_eval_coupling.jacobians.certify import (
    TOLERANCE,
    certify,
    with_probe_pulled_back,
)
from lm_eval_coupling.jacobians.closed import closed_row
from lm_eval_coupling.jacobians.differences import require_true_gradients
from lm_eval_coupling.jacobians.levels import BUDGET, certified_jacobian, certified_jacobians
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.numerics.precision import exact_arithmetic

AT_ONCE = 16  # input tokens; working memory is that of so many Jacobians and their two factors


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_pairs(
    call: Call, pairs: Sequence[tuple[int, int]], method: str = "auto"
) -> tuple[Float[Tensor, "pair d_model d_model"], Float[Tensor, " pair"]]:
    """Compute J of one block for pairs (output token, input token), skip connection excluded.

    Args:
        call: one block's call.
        pairs: absolute indices.
        method: as for :func:`~lm_eval_coupling.jacobians.engine.block_jacobians`.

    Returns:
        The Jacobians and their certificates. Where the input token of a causal model comes after
        the output token, both are exactly zero and not computed.
    """
    d_model = call.resid_pre.shape[-1]
    jacobians = call.resid_pre.new_zeros(len(pairs), d_model, d_model)
    errors = torch.zeros(len(pairs), dtype=torch.float64)
    rows: dict[int, list[int]] = defaultdict(list)
    for i, (output_token, input_token) in enumerate(pairs):
        if input_token <= output_token or not call.causal:
            rows[output_token].append(i)
    with call.ready():
        pulled = {token: with_probe_pulled_back(call, token) for token in rows}
        same = [i for members in rows.values() for i in members if pairs[i][0] == pairs[i][1]]
        for start in range(0, len(same), AT_ONCE):
            part = same[start : start + AT_ONCE]
            tokens = [pairs[i][0] for i in part]
            made = certified_jacobians([pulled[token] for token in tokens], tokens, method)
            for i, certified in zip(part, made, strict=True):
                jacobians[i], errors[i] = certified.jacobian, certified.error
        for token, members in rows.items():
            others = [i for i in members if pairs[i][1] != token]
            row = _row(pulled[token], token, [pairs[i][1] for i in others], method)
            for i, (jacobian, error) in zip(others, row, strict=True):
                jacobians[i], errors[i] = jacobian, error
    return jacobians, errors


def _row(
    call: Call, output_token: int, input_tokens: list[int], method: str
) -> Iterator[tuple[Tensor, float]]:
    """Yield J and its certificate for each input token.

    Some are computed together where a level can do that; one that is not certified is done alone.
    """
    while input_tokens:
        part, input_tokens = input_tokens[:AT_ONCE], input_tokens[AT_ONCE:]
        together = None
        if method in ("auto", "closed"):
            together = _or_none(closed_row, call, output_token, part)
        if together is not None:
            yield from _certified(call, output_token, part, together, method)
            continue
        first, rest = certified_jacobian(call, output_token, part[0], method), part[1:]
        yield first.jacobian, first.error
        if first.level == "autodiff":
            # One backward pass reaches all input tokens: the others cost nothing more.
            rest, input_tokens = rest + input_tokens, []
            together = _or_none(autodiff_row, call, output_token, rest, BUDGET) if rest else None
        is_autodiff = together is not None
        yield from _certified(call, output_token, rest, together, method, is_autodiff)


def _or_none(
    row: Callable[..., Float[Tensor, "token d_model d_model"]], *arguments: Any
) -> Tensor | None:
    try:
        return row(*arguments)
    except Exception as failure:
        # Alone, each pair finds the level that can, or says what is wrong.
        pass_on_lack_of_memory(failure)
        return None


def _certified(
    call: Call,
    output_token: int,
    input_tokens: list[int],
    together: Tensor | None,
    method: str,
    is_autodiff: bool = False,
) -> Iterator[tuple[Tensor, float]]:
    """Yield the Jacobians of ``together`` that are certified; compute the others, or all, alone."""
    for number, token in enumerate(input_tokens):
        jacobian = None if together is None else together[number]
        error = torch.inf if jacobian is None else certify(call, jacobian, output_token, token)
        if jacobian is None or not error <= TOLERANCE[call.dtype]:
            alone = certified_jacobian(call, output_token, token, method)
            jacobian, error = alone.jacobian, alone.error
        elif is_autodiff and token < output_token:
            require_true_gradients(call, jacobian, output_token, token)
        yield jacobian, error
