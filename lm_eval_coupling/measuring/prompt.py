"""Prompts in, one :class:`PromptCoupling` out for each. The only place that knows the order of the steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError, Reason, flag, reason_of, resolve_token
from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.jacobians.engine import require_model
from lm_eval_coupling.jacobians.protocol import Model
from lm_eval_coupling.measures import registry
from lm_eval_coupling.measures.formulas.choices import chosen_positions, written
from lm_eval_coupling.measures.registry import MeasureResult
from lm_eval_coupling.measuring.batch import Batch
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings, chosen_measures, chosen_ranks
from lm_eval_coupling.measuring.token_ids import token_ids
from lm_eval_coupling.numerics.memory import batches, keep_freed_memory
from lm_eval_coupling.numerics.precision import exact_arithmetic


@exact_arithmetic()
def measure_coupling(
    model: Model,
    prompts: Any,
    *,
    ranks: Any = (10, 30, 50),
    measures: Sequence[str] | str = ("depth", "regularity"),
    position: int | str = -1,
    dtype: str = "float32",
    method: str = "auto",
    window: int | None = None,
    tokens: str = "last8",
    layers: str = "spaced4",
    trajectories: bool = False,
    progress: bool = True,
) -> list[PromptCoupling]:
    """Measure block coupling at one token of each prompt.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        prompts: strings (tokenised with the tokenizer's own special tokens) or token ids, taken as they are, as lists,
            tensors, or what a tokenizer returned; see :func:`~lm_eval_coupling.measuring.token_ids.token_ids`. Of an image
            classifier pixel values [channel, height, width], to be measured at its class token with ``position=0``.
        ranks: numbers K of top singular vectors, one or several, or as on the command line, such as ``10+30``.
        measures: any of those of docs/measures.md, such as ``depth``, ``regularity``, ``swapped``, ``spectra``, ``self``, or
            as on the command line, such as ``depth+swapped``.
        position: token whose trajectory is measured, negative counts from the end; or several such as ``-1+0+last4`` or
            ``random8``, which give a record each.
        dtype: arithmetic of Jacobians and decompositions, ``float32`` or ``float64``.
        method: see :func:`~lm_eval_coupling.jacobians.block_jacobians`.
        window: blocks of the windowed line-shape score and expodistance; 11, or all of a shallower model's, unless given.
        tokens: of self- and context coupling: ``all``, ``lastN``, ``firstN``, ``randomN`` or positions such as ``0+3+-1``.
        layers: of self- and context coupling: ``all``, ``spacedN`` or blocks such as ``0+10+29``.
        trajectories: keep the principal components of all tokens' trajectories (with ``regularity``).
        progress: show a progress bar.

    Returns:
        One record per prompt, in order, or one per prompt and token. A prompt that cannot be
        measured gives a record whose ``reason`` says why.

    Raises:
        CouplingError: for settings that no prompt could be measured with.
    """
    require_model(model)
    position, progress = written("position", position), flag("progress", progress)
    chosen_positions(position, 10**6)  # is it one at all?
    settings = Settings(
        ranks=chosen_ranks(ranks),
        measures=chosen_measures(measures),
        dtype=dtype,
        method=method,
        window=window,
        tokens=tokens,
        layers=layers,
        trajectories=trajectories,
    )
    settings.check_shape(model.d_model, model.n_layers)
    encoded = token_ids(model, prompts)
    places = [
        (tokens, token) for tokens in encoded for token in chosen_positions(position, len(tokens))
    ]
    records: dict[int, PromptCoupling] = {}
    with tqdm(total=len(places), desc="Measuring coupling", disable=not progress) as bar:
        for together in groups(model, [tokens for tokens, _ in places], settings):
            prompts, tokens_there = zip(*(places[i] for i in together), strict=True)
            found = measure_prompts(model, prompts, tokens_there, settings)
            records.update(zip(together, found, strict=True))
            bar.update(len(together))
    return [records[i] for i in range(len(places))]


def groups(model: Model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[list[int]]:
    """Indices of the prompts to measure together: of about the same length, and as many as the device has room for."""
    itemsize = DTYPES[settings.dtype].itemsize
    return batches(
        model, [len(prompt) for prompt in prompts], rank=settings.ranks[-1], itemsize=itemsize
    )


def measure_prompt(
    model: Model, tokens: Sequence[int], position: int, settings: Settings
) -> PromptCoupling:
    """One prompt's record; never raises for what a single prompt or a lack of memory can cause."""
    return measure_prompts(model, [tokens], position, settings)[0]


@exact_arithmetic()
def measure_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    position: int | Sequence[int],
    settings: Settings,
) -> list[PromptCoupling]:
    """The records of several prompts, measured together; what fails together is measured in halves, down to one alone.

    ``position`` is one token of all prompts, or one for each; negative counts from the end.

    Returns:
        As many as there are prompts, in their order.
    """
    asked = [position] * len(prompts) if isinstance(position, int) else list(position)
    at: list[int] = []
    found: dict[int, dict[str, MeasureResult]] = {}
    for i, (tokens, token) in enumerate(zip(prompts, asked, strict=True)):
        try:
            at.append(resolve_token(token, len(tokens)))
        except CouplingError as error:
            at.append(token)
            found[i] = _nothing(settings, Reason("no_such_token", str(error)))
    there = [i for i in range(len(prompts)) if i not in found]
    measured = _measured(model, [prompts[i] for i in there], [at[i] for i in there], settings)
    found.update(zip(there, measured, strict=True))
    return [
        PromptCoupling(tuple(map(int, tokens)), at[i], settings.ranks, found[i])
        for i, tokens in enumerate(prompts)
    ]


def _nothing(settings: Settings, reason: Reason, seconds: float = 0.0) -> dict[str, MeasureResult]:
    share = seconds / len(settings.measures)
    return {name: MeasureResult({}, (reason,), share) for name in settings.measures}


def _measured(
    model: Model, prompts: Sequence[Sequence[int]], positions: Sequence[int], settings: Settings
) -> list[dict[str, MeasureResult]]:
    """What each measure found for each prompt."""
    if not prompts:
        return []
    start = time.perf_counter()
    try:
        return _together(model, prompts, positions, settings)
    except Exception as error:
        reason = reason_of(error)
    # Out of the handler: what failed is held by its traceback, and would leave the halves less memory.
    if reason.code == "out_of_memory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if len(prompts) == 1:
        return [_nothing(settings, reason, time.perf_counter() - start)]
    half = len(prompts) // 2
    return [
        one
        for part in (slice(0, half), slice(half, None))
        for one in _measured(model, prompts[part], positions[part], settings)
    ]


@torch.no_grad()
def _together(
    model: Model, prompts: Sequence[Sequence[int]], positions: Sequence[int], settings: Settings
) -> list[dict[str, MeasureResult]]:
    start = time.perf_counter()
    known = registry.registered_measures()
    # Those of the Jacobians J_tt first: their memory is given back before the others begin.
    names = sorted(settings.measures, key=lambda name: not known[name].jacobians)
    if model.device.type == "cpu":
        keep_freed_memory()
    derivative = known[names[0]].jacobians
    batch = Batch(model, prompts, positions, settings, derivative=derivative)
    if derivative:
        batch.blocks  # noqa: B018 here, because a failure would be that of the whole batch
    shared = (time.perf_counter() - start) / len(batch)
    found: dict[str, list[MeasureResult]] = {}
    for name in names:
        if not known[name].jacobians:
            batch.forget_jacobians()
        found[name] = [known[name].cast(part) for part in known[name].run(batch)]
    found[names[0]] = [
        MeasureResult(part.columns, part.reasons, part.seconds + shared) for part in found[names[0]]
    ]
    return [{name: found[name][i] for name in settings.measures} for i in range(len(batch))]
