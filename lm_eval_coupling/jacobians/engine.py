"""Jacobians of every block of a model, for one prompt or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, is_several, one_of, resolve_token, shown, whole
from lm_eval_coupling.jacobians.certify import DTYPES, TOLERANCE, probe
from lm_eval_coupling.jacobians.levels import (
    Certified,
    NotTogether,
    certified_jacobian,
    closed_together,
    passes,
    verify_each,
)
from lm_eval_coupling.jacobians.methods import METHODS
from lm_eval_coupling.jacobians.protocol import Call, Model, Trace
from lm_eval_coupling.jacobians.stack import Stack
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.spectra import SingularTriplets
from lm_eval_coupling.numerics.workers import run_each


@dataclasses.dataclass(frozen=True)
class BlockJacobians:
    """Jacobians of several blocks for one pair of tokens.

    Attributes:
        jacobians: J of each layer, in the arithmetic that was asked for.
        certificate: relative error of each against the model's own derivative, float64, on the
            host.
        method: level that each layer was computed at.
        layers: indices of the layers.
        device: where the model computed; the Jacobians may lie on the host.
        why: for each layer, why no faster level was taken, or None.
        triplets: top singular triplets of each, if they were asked for.
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
    """Compute the exact Jacobians J^l_{t2 t1} of every block for one prompt (paper, eq. 8).

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: ids of one prompt, [1, seq] or [seq], or its text. For an image classifier, pixel
            values [1, channel, height, width] of one image.
        output_token: t2; negative counts from the end.
        input_token: t1; ``None`` means t1 = t2. For t1 > t2 a causal model's J is exactly zero.
        layers: block indices from 0, one or several; ``None`` means all.
        method: ``auto``, ``closed``, ``token-local`` or ``autodiff``.
        dtype: arithmetic, ``torch.float32`` or ``torch.float64``, whatever dtype the model runs in.

    Returns:
        J[l, i, j] = ∂f^l_i(output token) / ∂x^{l-1}_j(input token), n_layers·d_model² numbers. They
        lie on the model's device up to 4 GiB, beyond that on the host, and in a temporary file
        where half of the host's free memory does not hold them.

    Raises:
        CouplingError: for a token or layer that does not exist, tokens that are no prompt, or an
            unknown method or dtype.
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


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_trace(
    trace: Trace, output_token: int, input_token: int, layers: Sequence[int], method: str
) -> BlockJacobians:
    """Compute :func:`block_jacobians` from a trace and absolute indices."""
    return _compute([trace], [(output_token, input_token)], layers, method)[0]


@exact_arithmetic()
@torch.no_grad()
def jacobians_of_traces(
    traces: Sequence[Trace],
    tokens: Sequence[int],
    method: str,
    rank: int | None = None,
    workers: int = 1,
    on_block: Callable[[], object] | None = None,
) -> list[BlockJacobians]:
    """Compute J_tt of every block for several prompts of one model, each at its own token t.

    The closed level computes all prompts of a block at once. Memory is that of one prompt times
    their number.

    Args:
        traces: trace of each prompt.
        tokens: index of the token of each prompt, from 0.
        method: as for :func:`block_jacobians`.
        rank: number of singular triplets to compute while the Jacobians lie on the device, if any.
        workers: number of blocks to compute side by side, on one core each. More than one only if
            the blocks are independent (:attr:`.protocol.Model.has_independent_blocks`).
        on_block: function to call, from any thread, after each block.

    Returns:
        For each prompt the result of :func:`block_jacobians`, with triplets if ``rank`` is given.
    """
    pairs = [(token, token) for token in tokens]
    layers = range(len(traces[0].calls))
    return _compute(traces, pairs, layers, method, rank, workers, on_block)


def _compute(
    traces: Sequence[Trace],
    pairs: Sequence[tuple[int, int]],
    layers: Sequence[int],
    method: str,
    rank: int | None = None,
    workers: int = 1,
    on_block: Callable[[], object] | None = None,
) -> list[BlockJacobians]:
    """Compute J of every layer for each trace at its pair (output token, input token)."""
    check_method(method)
    stream = traces[0].resid_final
    calls = [[trace.calls[layer] for trace in traces] for layer in layers]
    is_scattered = len({prompts[0].resid_pre.device for prompts in calls}) > 1
    stack = Stack(len(traces), len(calls), stream, rank=rank, scattered=is_scattered)
    on_block = on_block or (lambda: None)
    closed = _closed_results(calls, pairs, method, stack, workers, on_block)
    alone: dict[tuple[int, int], Certified] = {}  # by prompt and layer
    errors: list[Tensor] = []
    # One layer after the other: forward mode, which the token-local level uses, allows one thread.
    for i, result in enumerate(closed):
        if isinstance(result, NotTogether):
            certified = _one_by_one(calls[i], pairs, method, result.why)
            stack.put(i, torch.stack([each.jacobian for each in certified]))
            alone.update({(prompt, i): each for prompt, each in enumerate(certified)})
            result = stream.new_full((len(traces),), torch.nan)
            on_block()
        errors.append(result.to(stream.device))
    # One transfer after all layers: the device would stop and wait at each.
    certificates = torch.stack(errors, dim=1).cpu().double()
    for prompt, i in (~passes(certificates, stream.dtype)).nonzero().tolist():
        if (prompt, i) not in alone:
            output_token, input_token = pairs[prompt]
            call = calls[i][prompt]
            alone[prompt, i] = certified_jacobian(call, output_token, input_token, method)
            stack.correct(prompt, i, alone[prompt, i].jacobian)
        certificates[prompt, i] = alone[prompt, i].error
    for i, prompts in enumerate(calls):
        good = passes(certificates[:, i], stream.dtype).tolist()
        is_together = [is_good and (prompt, i) not in alone for prompt, is_good in enumerate(good)]
        verify_each(prompts, stack.jacobians[:, i], is_together, pairs)
    triplets = stack.finish()

    results = []
    for prompt in range(len(traces)):
        slower = [alone.get((prompt, i)) for i in range(len(calls))]
        results.append(
            BlockJacobians(
                jacobians=stack.jacobians[prompt],
                certificate=certificates[prompt],
                method=["closed" if entry is None else entry.level for entry in slower],
                layers=list(layers),
                device=stream.device,
                why=[None if entry is None else entry.why for entry in slower],
                triplets=None if triplets is None else triplets[prompt],
            )
        )
    return results


def _closed_results(
    calls: Sequence[Sequence[Call]],
    pairs: Sequence[tuple[int, int]],
    method: str,
    stack: Stack,
    workers: int,
    on_block: Callable[[], object],
) -> list[Tensor | NotTogether]:
    """Compute layers by the closed level, ``workers`` at a time, and put their Jacobians in place.

    Returns:
        For each layer the certificates of all prompts, or the reason why the closed level does not
        apply to all of them.
    """
    if method not in ("auto", "closed"):
        return [NotTogether()] * len(calls)

    def compute_layer(i: int) -> Tensor | NotTogether:
        try:
            jacobians, certificates = closed_together(calls[i], pairs)
        except NotTogether as failure:
            return NotTogether(failure.why)  # a new one: a traceback would keep tensors alive
        stack.put(i, jacobians)
        on_block()
        return certificates

    return run_each(compute_layer, range(len(calls)), workers)


def _one_by_one(
    calls: Sequence[Call], pairs: Sequence[tuple[int, int]], method: str, why: str | None
) -> list[Certified]:
    """Compute J of one block for each prompt; ``why`` is why the closed level does not apply."""
    return [
        certified_jacobian(call, *pair, method, closed_fails=why)
        for call, pair in zip(calls, pairs, strict=True)
    ]


def _chosen_layers(layers: Any, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers))
    given = layers if is_several(layers) else [layers]
    chosen = [whole("layers", layer, -n_layers, n_layers - 1) % n_layers for layer in given]
    if not chosen:
        raise CouplingError(f"got no layers, expected some of 0 to {n_layers - 1}, or None for all")
    return chosen


def check_method(method: str) -> str:
    """Return the name of a level.

    Raises:
        CouplingError: if there is no such level.
    """
    return one_of("method", method, METHODS)


def chosen_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype of torch, given as such or by its name.

    Raises:
        CouplingError: if it is neither float32 nor float64.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(chosen, torch.dtype) and chosen in TOLERANCE:
        return chosen
    raise CouplingError(
        f"got dtype={shown(dtype)}, expected one of {', '.join(map(str, TOLERANCE))}, "
        "whatever the model runs in"
    )


def require_model(model: Any) -> None:
    """Raise CouplingError for a model that has not been wrapped, or was changed since."""
    if not hasattr(model, "traces"):
        raise CouplingError(
            f"got a {type(model).__name__} as model, expected a ResidualModel; "
            "wrap it with ResidualModel.wrap(model)"
        )
    if require_unchanged := getattr(model, "require_unchanged", None):
        require_unchanged()
