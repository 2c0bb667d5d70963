"""Miscoupling between exact Jacobians of several tokens and blocks of one prompt.

A Jacobian is zero where a later token cannot move an earlier one; its miscoupling is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.jacobians.certify import TOLERANCE, with_probe_pulled_back
from lm_eval_coupling.jacobians.protocol import Call, Trace
from lm_eval_coupling.jacobians.token_pairs import AT_ONCE, jacobians_of_pairs
from lm_eval_coupling.measures.formulas.miscoupling import at_ranks, coupling_matrices, miscoupling
from lm_eval_coupling.numerics.spectra import numerical_rank, top_singular


@dataclass(frozen=True)
class PairJacobians:
    """Jacobians of one prompt over chosen layers and pairs of tokens.

    Attributes:
        jacobians: matrices on the host.
        device: device that they were computed on.
    """

    jacobians: Float[Tensor, "layer pair d_model d_model"]
    device: torch.device


def jacobians_over(
    trace: Trace, layers: Sequence[int], pairs: Sequence[tuple[int, int]], method: str
) -> PairJacobians:
    """Return the Jacobians of several layers for pairs (output token, input token), on the host.

    Raises:
        Unmeasurable: if one of them fails its certificate at every level.
    """
    jacobians = [_certified(trace.calls[layer], pairs, method).cpu() for layer in layers]
    return PairJacobians(torch.stack(jacobians), trace.resid_final.device)


def rows_to(
    trace: Trace, layer: int, token: int, last: int, method: str
) -> Iterator[tuple[range, Float[Tensor, "part d_model d_model"]]]:
    """Compute the Jacobians of one block from every token up to ``last`` to ``token``.

    All of a long prompt at once would take seq · d_model² numbers.

    Yields:
        A range of input tokens, and their Jacobians on the device.

    Raises:
        Unmeasurable: as :func:`jacobians_over` does.
    """
    call = with_probe_pulled_back(trace.calls[layer], token)
    for start in range(0, last + 1, 4 * AT_ONCE):
        tokens = range(start, min(start + 4 * AT_ONCE, last + 1))
        yield tokens, _certified(call, [(token, t) for t in tokens], method)


def _certified(
    call: Call, pairs: Sequence[tuple[int, int]], method: str
) -> Float[Tensor, "pair d_model d_model"]:
    J, errors = jacobians_of_pairs(call, pairs, method)
    worst = int(errors.nan_to_num(math.inf).argmax())
    if not errors[worst] <= TOLERANCE[J.dtype]:
        output, given = pairs[worst]
        raise Unmeasurable(
            "certificate",
            f"the Jacobian of block {call.layer} for tokens {given} and {output} is off by "
            f"{errors[worst]:.1e} against the model's own derivative, "
            f"expected at most {TOLERANCE[J.dtype]:.0e}",
        )
    return J


def miscoupling_of_all(
    pairs: PairJacobians, ranks: Sequence[int]
) -> Float[np.ndarray, "rank layer layer pair pair"]:
    """Return m̃ of every Jacobian in the basis of every other.

    The first index of each kind is the Jacobian's, the second the basis's.
    """
    layers, count, d_model, _ = pairs.jacobians.shape
    J = pairs.jacobians.reshape(-1, d_model, d_model)
    device = torch.device("cpu") if pairs.device.type == "mps" else pairs.device
    triplets = top_singular(J, ranks[-1], device=device)
    rank = numerical_rank(triplets.S)
    rows = []
    for i in range(len(J)):  # The products of all Jacobians at once would be large.
        A = coupling_matrices(J[i : i + 1], triplets.U, triplets.V)[0]
        rows.append(at_ranks(A, rank, ranks, lambda A: {"m": miscoupling(A, normalized=True)})["m"])
    miscouplings = torch.stack(rows, dim=1).double().cpu()
    split = miscouplings.reshape(len(ranks), layers, count, layers, count)
    return split.permute(0, 1, 3, 2, 4).numpy().astype(np.float32)
