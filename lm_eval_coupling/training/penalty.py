"""Differentiable coupling: a term to add to the loss of a training."""

from __future__ import annotations

import random
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, one_of, whole
from lm_eval_coupling.measures.formulas.ablations import rotated_miscoupling
from lm_eval_coupling.measures.formulas.miscoupling import miscoupling
from lm_eval_coupling.numerics.spectra import SingularTriplets, numerical_rank, top_singular
from lm_eval_coupling.residual.scored import evaluation_mode
from lm_eval_coupling.training.token_jacobians import token_jacobians

Form = Literal["rotated", "raw"]


def coupling_penalty(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    *,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    rank: int = 10,
    form: Form = "rotated",
    tokens: int = 1,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Return the mean coupling at a few random tokens, differentiable by the weights.

    Add ``strength * coupling_penalty(…)`` to the loss: a positive strength lowers coupling, a
    negative one raises it. The value is the one that ``measure_coupling`` gives at these tokens.
    The gradient is exact for singular bases that are held fixed within a step.

    Dropout is off inside, no random state is used, and the model's modes are restored. Each token
    costs two passes over its prompt, and about twelve passes of every block over d_model tokens
    with the backward pass. Memory grows with n_layers · d_model · (d_model + MLP width).

    Args:
        model: a transformers decoder with keys and values, such as Llama, Qwen, GPT-NeoX or GPT-2.
        input_ids: token ids of a batch.
        attention_mask: 0 for padding, as for the model; by default nothing is padding.
        rank: number K of top singular vectors, from 2 to d_model.
        form: ``rotated`` for coupling after a common rotation of both bases, which is smooth;
            ``raw`` for the coupling itself.
        tokens: number of random tokens, each of a random row. First tokens are not drawn.
        seed: seed of the choice of tokens, such as the step.

    Returns:
        A number from 0 to 1; 0 where no pair of blocks has a defined coupling.

    Raises:
        CouplingError: for a model that is not supported, a rank it is too narrow for, or a batch
            whose rows all have fewer than two tokens.
    """
    rank, tokens = whole("rank", rank, 2), whole("tokens", tokens, 1)
    one_of("form", form, ("rotated", "raw"))
    rows = [
        ids if attention_mask is None else ids[attention_mask[i].bool()]
        for i, ids in enumerate(input_ids)
    ]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise CouplingError(
            "got input_ids whose rows have fewer than two tokens, expected a row of two or more"
        )
    draw = random.Random(seed)
    values = []
    with evaluation_mode(model), torch.autocast(input_ids.device.type, enabled=False):
        for _ in range(tokens):
            ids = draw.choice(rows)
            J = token_jacobians(model, ids[: draw.randrange(2, len(ids) + 1)])
            J = J if J.dtype == torch.float64 else J.float()
            values.append(coupling_in_bases(J, fixed_bases(J, rank), form))
    return torch.stack(values).mean()


def fixed_bases(J: Float[Tensor, "layer d_model d_model"], rank: int) -> SingularTriplets:
    """Return the top singular triplets of every J, without a graph.

    Raises:
        CouplingError: if the rank is above d_model.
    """
    return top_singular(J.detach(), rank)


def coupling_in_bases(
    J: Float[Tensor, "layer d_model d_model"], bases: SingularTriplets, form: Form
) -> Float[Tensor, ""]:
    """Return 1 − mean miscoupling over different layers, differentiable by J.

    Pairs with a basis of lower rank or a zero matrix do not count.
    """
    A = torch.einsum("bdi,lde,bej->lbij", bases.U, J, bases.V)
    rank = A.shape[-1]
    different = ~torch.eye(len(J), dtype=torch.bool, device=J.device)
    full = numerical_rank(bases.S) == rank
    nonzero = A.detach().flatten(-2).norm(dim=-1) != 0  # NaN, which must not vanish, is no zero
    A = A[different & full & nonzero]
    if not len(A):
        return J.sum() * 0
    values = rotated_miscoupling(A) if form == "rotated" else miscoupling(A, normalized=True)
    return 1 - values.mean()
