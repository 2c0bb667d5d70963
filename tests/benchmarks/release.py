"""The procedure of the paper's release, written anew from its description: the baseline of
`against_release.py`.

For each layer, the whole sequence is differentiated: a batched vector-Jacobian product over the
rows of the output token, in 2·(n // 20) + 5 chunks; then a full SVD; then a Python loop over layer
pairs, ranks and both orders of U and V. It uses transformers and torch only, so that it is also an
oracle. One difference: the last layer is differentiated before the final norm, as everywhere else
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timing import seconds
from torch import Tensor, nn


@dataclass
class Release:
    """What the procedure found, and its seconds by stage, ``jacobians`` of the layers asked for
    only.
    """

    J: Tensor
    U: Tensor
    S: Tensor
    V: Tensor
    scores: dict
    seconds: dict[str, float]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model."""
    layers = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)


@torch.no_grad()
def block_calls(model: nn.Module, tokens: Sequence[int]) -> list[tuple[Callable, Tensor]]:
    """Each layer as a function of the whole sequence [1, seq, d_model], with the input it had."""
    calls = []

    def keep(module, args, kwargs):
        def function(x, rest=args[1:]):
            output = module(x, *rest, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        calls.append((function, args[0]))

    with contextlib.ExitStack() as stack:
        for block in blocks_of(model):
            stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(torch.tensor([tokens], device=model.device), use_cache=False)
    return calls


def block_jacobian(function: Callable, x: Tensor) -> Tensor:
    """∂f/∂x at the last token, [d_model, d_model], skip connection excluded."""
    seq, d_model = x.shape[1:]
    eye = torch.eye(d_model, dtype=x.dtype, device=x.device)
    _, pull_back = torch.func.vjp(lambda x: function(x)[0, -1], x)
    chunks = eye.chunk(2 * (seq // 20) + 5)
    return torch.cat([torch.func.vmap(pull_back)(rows)[0][:, 0, -1] for rows in chunks]) - eye


def score(J: Tensor, left: Tensor, S: Tensor, right: Tensor, rank: int) -> tuple[float, float]:
    """m_K of |leftᵀ J right| against the top singular values of J, over their norm and over their
    sum.
    """
    S = S[:rank]
    distance = torch.linalg.norm((left[:, :rank].T @ J @ right[:, :rank]).abs() - torch.diag(S))
    return (distance / torch.linalg.norm(S)).item(), (distance / S.sum()).item()


def all_pairs(J: Tensor, U: Tensor, S: Tensor, V: Tensor, ranks: Sequence[int]) -> dict:
    """scores[order][rank][l][l'] = (norm, trace), one pair of layers at a time."""
    layers = range(len(J))
    bases = {"ujv": (U, V), "vju": (V, U)}
    return {
        order: {
            k: [[score(J[a], left[b], S[a], right[b], k) for b in layers] for a in layers]
            for k in ranks
        }
        for order, (left, right) in bases.items()
    }


def run(
    model: nn.Module,
    tokens: Sequence[int],
    ranks: Sequence[int],
    layers: Sequence[int],
    rest: Tensor,
) -> Release:
    """The whole procedure on one prompt.

    Args:
        model: a transformers model, in the dtype of the arithmetic.
        tokens: token ids of the prompt.
        ranks: numbers K of singular vectors.
        layers: those to differentiate; all of them for the whole procedure.
        rest: Jacobians of all layers, which stand in for those that are not differentiated.
    """
    found: dict = {}
    spent = {"trace": seconds(lambda: found.update(calls=block_calls(model, tokens)))}
    J = rest.clone()

    def jacobians():
        for layer in layers:
            J[layer] = block_jacobian(*found["calls"][layer])

    def spectra():
        parts = [torch.linalg.svd(matrix) for matrix in J]
        found.update(
            U=[u for u, _, _ in parts], S=[s for _, s, _ in parts], V=[vt.T for _, _, vt in parts]
        )

    spent["jacobians"] = seconds(jacobians)
    spent["spectra"] = seconds(spectra)
    U, S, V = (torch.stack(found[name]) for name in "USV")
    spent["pairs"] = seconds(lambda: found.update(scores=all_pairs(J, U, S, V, ranks)))
    return Release(J, U, S, V, found["scores"], spent)


def normalized_miscoupling(found: Release, rank: int, layers: Sequence[int]) -> Tensor:
    """m̃[l, l'] of A = U_{l'}ᵀ J^l V_{l'} among these layers, from the baseline's own matrices."""
    values = torch.empty(len(layers), len(layers), dtype=torch.float64)
    for i, a in enumerate(layers):
        for j, b in enumerate(layers):
            A = (found.U[b, :, :rank].T @ found.J[a] @ found.V[b, :, :rank]).double()
            values[i, j] = torch.linalg.norm(A - torch.diag(A.diagonal())) / torch.linalg.norm(A)
    return values
