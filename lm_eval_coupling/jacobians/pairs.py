"""Jacobians J_{t1 t2} of one block for many pairs of tokens, each certified like a single one.

Pairs with one token, t1 = t2, go through the closed level together; pairs that share their output token share the half of
the block after its attention core, and one backward pass certifies them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.autodiff import autodiff_row
from lm_eval_coupling.jacobians.certify import certify, require_true_gradients, with_probe_pulled_back
from lm_eval_coupling.jacobians.closed import closed_row
from lm_eval_coupling.jacobians.engine import BUDGET, TOLERANCE, certified_jacobian, certified_jacobians
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.numerics.precision import exact_arithmetic

AT_ONCE = 16  # input tokens: working memory is that of so many Jacobians and their halves


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_pairs(
    call: Call, pairs: Sequence[tuple[int, int]], method: str = "auto"
) -> tuple[Float[Tensor, "pair d_model d_model"], Float[Tensor, " pair"]]:
    """J of one block for pairs (output token, input token), skip connection excluded, with their certificates.

    Args:
        call: one block's call.
        pairs: absolute indices.
        method: as for :func:`~lm_eval_coupling.jacobians.block_jacobians`.

    Returns:
        Of a causal model exactly zero, and not computed, where the input token comes after the output token.
    """
    d_model = call.resid_pre.shape[-1]
    found = call.resid_pre.new_zeros(len(pairs), d_model, d_model)
    errors = torch.zeros(len(pairs), dtype=torch.float64)
    rows: dict[int, list[int]] = defaultdict(list)
    for i, (output_token, input_token) in enumerate(pairs):
        if input_token <= output_token or not call.causal:
            rows[output_token].append(i)
    with call.ready():
        pulled = {token: with_probe_pulled_back(call, token) for token in rows}
        same = [i for members in rows.values() for i in members if pairs[i][0] == pairs[i][1]]
        for part in _parts(same):
            tokens = [pairs[i][0] for i in part]
            alone = certified_jacobians([pulled[token] for token in tokens], tokens, method)
            for i, one in zip(part, alone, strict=True):
                found[i], errors[i] = one.jacobian, one.error
        for token, members in rows.items():
            others = [i for i in members if pairs[i][1] != token]
            made = _row(pulled[token], token, [pairs[i][1] for i in others], method)
            for i, (jacobian, error) in zip(others, made, strict=True):
                found[i], errors[i] = jacobian, error
    return found, errors


def _parts(items: list[int]) -> list[list[int]]:
    return [items[i : i + AT_ONCE] for i in range(0, len(items), AT_ONCE)]


def _row(call: Call, output_token: int, input_tokens: list[int], method: str) -> list[tuple[Tensor, float]]:
    """Each with its certificate: all together where a level has a way to that and the result is certified, else alone."""
    if not input_tokens:
        return []
    together: list[Tensor | None] | None = None
    slowly = False
    if method in ("auto", "closed"):
        together = _all_or_none(lambda: [J for part in _parts(input_tokens) for J in closed_row(call, output_token, part)])
    if together is None:
        first, rest = certified_jacobian(call, output_token, input_tokens[0], method), input_tokens[1:]
        slowly = bool(rest) and first.level == "autodiff"
        of_rest = _all_or_none(lambda: autodiff_row(call, output_token, rest, BUDGET)) if slowly else None
        together = [first.jacobian, *(of_rest or [None] * len(rest))]
    found: list[tuple[Tensor, float]] = []
    for jacobian, token in zip(together, input_tokens, strict=True):
        error = torch.inf if jacobian is None else certify(call, jacobian, output_token, token)
        if jacobian is None or not error <= TOLERANCE[call.dtype]:
            one = certified_jacobian(call, output_token, token, method)
            jacobian, error = one.jacobian, one.error
        elif slowly and token < output_token:
            require_true_gradients(call, jacobian, output_token, token)
        found.append((jacobian, error))
    return found


def _all_or_none(make: Callable[[], Iterable[Tensor]]) -> list[Tensor | None] | None:
    try:
        return [*make()]
    except Exception as failure:  # alone, each pair finds the level that can, or says what is wrong
        pass_on_lack_of_memory(failure)
        return None
