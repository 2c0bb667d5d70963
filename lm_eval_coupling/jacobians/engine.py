"""Exact block Jacobians.

What is differentiated: f^l = F^l − identity, F^l being the block as a map of the residual stream, from the block's input
(`hook_resid_pre`) to its output (`hook_resid_post`): before the final norm, skip connection excluded. One block, one input
token, one output token: J[i, j] = ∂f^l_i(token t2) / ∂x^{l-1}_j(token t1) (paper, eq. 8). Nothing is averaged, summed over
positions or approximated; TransformerLens' `JacobianLens` is averaged and reaches to the final layer, and the paper's
release differentiates norm∘block in its last layer.

Levels: ``closed`` (matrix products, where every step has a rule), ``token-local`` (one-token passes, any softmax attention),
``autodiff`` (whole sequence, any model). ``auto`` takes the first whose result agrees with the model's own derivative
(certify.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_eval_coupling.errors import (
    CouplingError,
    is_several,
    one_of,
    pass_on_lack_of_memory,
    resolve_token,
    shown,
    whole,
)
from lm_eval_coupling.jacobians.attention_core import NoAttentionCore
from lm_eval_coupling.jacobians.autodiff import autodiff_jacobian
from lm_eval_coupling.jacobians.certify import (
    DTYPES,
    TOLERANCE,
    Truth,
    certify_each,
    probe,
    require_not_constant,
    require_true_gradients,
)
from lm_eval_coupling.jacobians.closed import closed_jacobian, closed_jacobians
from lm_eval_coupling.jacobians.methods import METHODS
from lm_eval_coupling.jacobians.protocol import Call, Model, Trace
from lm_eval_coupling.jacobians.rules import NoRule
from lm_eval_coupling.jacobians.stack import Stack
from lm_eval_coupling.jacobians.token_local import token_local_jacobian
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.spectra import SingularTriplets

LEVELS = {
    "closed": closed_jacobian,
    "token-local": token_local_jacobian,
    "autodiff": autodiff_jacobian,
}
_DIGITS_KEPT = 0.1  # of the tolerance: a level that is as near as that to a small J has formed it without the identity
_NO_FLOAT64 = "the device has no float64, so that digits of it may be lost"
BUDGET = 1 << 30  # bytes that the directions differentiated at once may take


@dataclasses.dataclass(frozen=True)
class BlockJacobians:
    """Jacobians of several blocks for one pair of tokens.

    ``certificate`` is each layer's relative error against the model's own derivative, ``method`` the level each layer was
    computed at, ``layers`` their indices, ``device`` where the model computed (the Jacobians may lie on the host). ``why``
    says of each layer why no faster level was taken; ``triplets`` are there where they were asked for.
    """

    jacobians: Float[Tensor, "layer d_model d_model"]
    certificate: Float[Tensor, " layer"]
    method: list[str]
    layers: list[int]
    device: torch.device
    why: list[str | None] = dataclasses.field(default_factory=list)
    triplets: SingularTriplets | None = None


@exact_arithmetic()
@torch.no_grad()
def block_jacobians(
    model: Model,
    tokens: Tensor | Sequence[Any] | str,
    *,
    output_token: int = -1,
    input_token: int | None = None,
    layers: Sequence[int] | int | None = None,
    method: str = "auto",
    dtype: torch.dtype | str = torch.float32,
) -> BlockJacobians:
    """Exact Jacobians J^l_{t1 t2} of every block for one prompt (paper, eq. 8).

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: ids of one prompt, [1, seq] or [seq], or its text; or pixel values [1, channel, height, width] of one image.
        output_token: t2; negative counts from the end.
        input_token: t1; ``None`` means t1 = t2. For t1 > t2 a causal model's Jacobian is exactly zero.
        layers: block indices from 0, one or several; ``None`` means all.
        method: ``auto``, ``closed``, ``token-local`` or ``autodiff``.
        dtype: arithmetic, ``torch.float32`` or ``torch.float64``, whatever dtype the model runs in.

    Returns:
        J[l, i, j] = ∂f^l_i(output token) / ∂x^{l-1}_j(input token): n_layers·d_model² numbers, on the model's device up to
        4 GiB, beyond on the host, and in a temporary file where half of its free memory does not hold them.

    Raises:
        CouplingError: for a token or layer that does not exist, what is no prompt, or an unknown method or dtype.
    """
    require_model(model)
    dtype, method = chosen_dtype(dtype), check_method(method)
    chosen = _chosen_layers(layers, model.n_layers)
    is_image = isinstance(tokens, Tensor) and tokens.is_floating_point()
    prompt = model.encode(tokens) if is_image or isinstance(tokens, str) else tokens
    try:
        seq = torch.as_tensor(prompt).numel()
    except (TypeError, ValueError, RuntimeError):
        raise CouplingError(
            f"got {str(tokens)[:80]!r} as a prompt, expected its token ids [1, seq] or its text"
        ) from None
    t2 = resolve_token(output_token, seq, "output_token")
    t1 = t2 if input_token is None else resolve_token(input_token, seq, "input_token")
    (trace,) = model.traces([prompt], dtype, [t2], probe)
    return jacobians_of_trace(trace, t2, t1, chosen, method)


def _chosen_layers(layers: Any, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers))
    given = layers if is_several(layers) else [layers]
    found = [whole("layers", layer, -n_layers, n_layers - 1) % n_layers for layer in given]
    if not found:
        raise CouplingError(f"got no layers, expected some of 0 to {n_layers - 1}, or None for all")
    return found


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_trace(
    trace: Trace, output_token: int, input_token: int, layers: Sequence[int], method: str
) -> BlockJacobians:
    """As :func:`block_jacobians`, from a trace and absolute indices."""
    return _made([trace], [(output_token, input_token)], layers, method, None)[0]


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_traces(
    traces: Sequence[Trace], tokens: Sequence[int], method: str, rank: int | None = None
) -> list[BlockJacobians]:
    """J_tt of every block for several prompts of one model, each at its own token t, as absolute index.

    Where the closed level has rules, its steps are gone through once for all prompts. Memory: that of one prompt times
    their number. With ``rank`` each comes with so many of its singular triplets, found while it lies on the device.

    Returns:
        For each prompt what :func:`block_jacobians` gives, with its triplets where there is a ``rank``.
    """
    return _made(
        traces, [(token, token) for token in tokens], range(len(traces[0].calls)), method, rank
    )


def _made(
    traces: Sequence[Trace],
    pairs: Sequence[tuple[int, int]],
    layers: Sequence[int],
    method: str,
    rank: int | None,
) -> list[BlockJacobians]:
    """Of each trace for its pair (output token, input token)."""
    check_method(method)
    like, calls = (
        traces[0].resid_final,
        [[trace.calls[layer] for trace in traces] for layer in layers],
    )
    scattered = len({of_block[0].resid_pre.device for of_block in calls}) > 1
    stack = Stack(len(traces), len(calls), like, rank=rank, scattered=scattered)
    proofs: dict[tuple[int, int], Certified] = {}
    errors = []
    for layer, of_block in enumerate(calls):
        found, error, why = (
            _closed_together(of_block, pairs) if method in ("auto", "closed") else (None, None, "")
        )
        if found is None or error is None:
            alone = [
                certified_jacobian(call, t, s, method, why)
                for call, (t, s) in zip(of_block, pairs, strict=True)
            ]
            proofs |= {(prompt, layer): one for prompt, one in enumerate(alone)}
            found, error = (
                torch.stack([one.jacobian for one in alone]),
                like.new_full((len(traces),), torch.nan),
            )
        stack.put(layer, found)
        errors.append(error.to(like.device))
    certificates = (
        torch.stack(errors, dim=1).cpu().double()
    )  # read from the device once, when all are made
    for prompt, layer in (~_passes(certificates, like.dtype)).nonzero().tolist():
        if (prompt, layer) not in proofs:
            one = certified_jacobian(
                calls[layer][prompt], pairs[prompt][0], pairs[prompt][1], method
            )
            stack.correct(prompt, layer, one.jacobian)
            proofs[prompt, layer] = one
        certificates[prompt, layer] = proofs[prompt, layer].error
    triplets = stack.finish()

    def of_prompt(prompt: int) -> BlockJacobians:
        each = [proofs.get((prompt, layer)) for layer in range(len(calls))]
        return BlockJacobians(
            jacobians=stack.jacobians[prompt],
            certificate=certificates[prompt],
            method=["closed" if one is None else one.level for one in each],
            layers=list(layers),
            device=like.device,
            why=[None if one is None else one.why for one in each],
            triplets=None if triplets is None else triplets[prompt],
        )

    return [of_prompt(prompt) for prompt in range(len(traces))]


def _passes(certificates: Float[Tensor, "*shape"], dtype: torch.dtype) -> Bool[Tensor, "*shape"]:
    """Exactly 0 is looked at again alone: a Jacobian of zero with a derivative of zero may be one that was not taken."""
    return (certificates > 0) & (certificates <= TOLERANCE[dtype])


@dataclasses.dataclass(frozen=True)
class Certified:
    """One Jacobian, its certificate, the level it comes from, and in words why no faster level gave it."""

    jacobian: Float[Tensor, "d_model d_model"]
    error: float
    level: str
    why: str | None = None


def certified_jacobians(
    calls: Sequence[Call], tokens: Sequence[int], method: str
) -> list[Certified]:
    """:func:`certified_jacobian` of one block's J_tt for several prompts: together where that is certified, else alone."""
    found, errors, why = None, None, ""
    if method in ("auto", "closed"):
        found, errors, why = _closed_together(calls, [(token, token) for token in tokens])
    good = [False] * len(calls) if errors is None else _passes(errors, calls[0].dtype).tolist()
    known = [] if errors is None else errors.tolist()
    return [
        Certified(found[i], known[i], "closed")
        if found is not None and good[i]
        else certified_jacobian(call, token, token, method, why)
        for i, (call, token) in enumerate(zip(calls, tokens, strict=True))
    ]


def _closed_together(
    calls: Sequence[Call], pairs: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "prompt d_model d_model"] | None, Float[Tensor, " prompt"] | None, str]:
    """J_tt of one block for several prompts by the closed level, with certificates; or why it has none for them."""
    if any(output_token != input_token for output_token, input_token in pairs):
        return None, None, ""
    tokens = [token for token, _ in pairs]
    with calls[0].ready():
        try:
            found = closed_jacobians(calls, tokens)
            return found, certify_each(calls, found, tokens), ""
        except (
            Exception
        ) as error:  # alone, each prompt finds the level that can, or says what is wrong
            pass_on_lack_of_memory(error)
            # What no rule is known for is not known for one prompt either.
            return (
                None,
                None,
                _in_words("closed", error) if isinstance(error, (NoRule, NoAttentionCore)) else "",
            )


def certified_jacobian(
    call: Call, output_token: int, input_token: int, method: str, closed_fails: str = ""
) -> Certified:
    """J of one block at the first level whose result is certified; ``auto`` falls to the next level on failure.

    ``closed_fails`` says why the closed level need not be tried.

    Returns:
        J without the skip connection, its relative error, the level that made it, and in words why levels before it did not.

    Raises:
        RuntimeError: as the device has it, if memory runs out, whatever the level.
        CouplingError: if the block does not move as its gradients say.
        Exception: whatever the last level failed with.
    """
    levels = list(LEVELS) if method == "auto" else [method]
    why = []
    if closed_fails and method == "auto":
        levels = [level for level in levels if level != "closed"]
        why.append(closed_fails)
    if input_token > output_token:
        call = (
            call.without_keys()
        )  # what an attention core is recorded from ends at the output token
    with call.ready():
        truth = Truth.of(call, output_token, input_token)
        for level in levels:
            try:
                jacobian, error, small = _at_level(level, call, truth, (output_token, input_token))
            except Exception as failure:
                pass_on_lack_of_memory(failure)
                if level == levels[-1]:
                    raise
                why.append(_in_words(level, failure))
                continue
            if error <= TOLERANCE[call.dtype] or level == levels[-1]:
                break
            why.append(f"{level}: off by {error:.1e}")
        if error <= TOLERANCE[call.dtype]:
            _require_derivative(call, truth, jacobian, error, (output_token, input_token), level)
    why += [small] if small else []
    return Certified(jacobian.to(call.dtype), error, level, "; ".join(why) or None)


def _at_level(
    level: str, call: Call, truth: Truth, tokens: tuple[int, int]
) -> tuple[Tensor, float, str]:
    """J, its error, and what is to be said of it; in float64 where the identity left it too few digits."""
    jacobian = LEVELS[level](call, *tokens, BUDGET)
    error = truth.error(jacobian)
    if truth.finer is not None and not error <= _DIGITS_KEPT * TOLERANCE[call.dtype]:
        with truth.finer.ready():
            jacobian = LEVELS[level](truth.finer, *tokens, BUDGET)
        return (
            jacobian,
            truth.error(jacobian.to(call.dtype)),
            "small beside the identity: in float64",
        )
    lost = (
        truth.finer is None and level != "closed" and truth.is_small and call.dtype == torch.float32
    )
    return (
        jacobian,
        error,
        f"small beside the identity: {_NO_FLOAT64}" if lost and tokens[0] == tokens[1] else "",
    )


def _in_words(level: str, error: Exception) -> str:
    return f"{level}: " + (" ".join(str(error).split())[:120] or type(error).__name__)


def _require_derivative(
    call: Call, truth: Truth, jacobian: Tensor, error: float, tokens: tuple[int, int], level: str
) -> None:
    """What agrees with autograd must also be how the block really moves: a part of it may run without gradients."""
    output_token, input_token = tokens
    if output_token == input_token:
        require_not_constant(call, jacobian, error, output_token)
    if level != "closed" and input_token <= output_token:
        call = truth.finer or call  # differences of outputs lose the same digits
        with call.ready():
            require_true_gradients(call, jacobian.to(call.dtype), output_token, input_token)


def check_method(method: str) -> str:
    """Refuse an unknown level by name."""
    return one_of("method", method, METHODS)


def chosen_dtype(dtype: Any) -> torch.dtype:
    """Return the arithmetic that was asked for, by its name or as torch's own.

    Raises:
        CouplingError: for any other.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(chosen, torch.dtype) and chosen in TOLERANCE:
        return chosen
    raise CouplingError(
        f"got dtype={shown(dtype)}, expected one of {', '.join(map(str, TOLERANCE))}, "
        "whatever the model runs in"
    )


def require_model(model: Any) -> None:
    """Refuse a model that has not been wrapped."""
    if not hasattr(model, "traces"):
        raise CouplingError(
            f"got a {type(model).__name__} as model, expected a ResidualModel; wrap it with ResidualModel.wrap(model)"
        )
