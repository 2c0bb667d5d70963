"""Measurement of prompts: one :class:`PromptCoupling` for each."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError, Reason, flag, reason_of, resolve_token
from lm_eval_coupling.jacobians.certify import DTYPES, probe
from lm_eval_coupling.jacobians.engine import require_model
from lm_eval_coupling.jacobians.protocol import Model, Trace
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.choices import chosen_positions, written
from lm_eval_coupling.measures.registry import registered_measures
from lm_eval_coupling.measuring.batch import ON_BLOCK, Batch
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import (
    LONG_PROMPT,
    Settings,
    chosen_measures,
    chosen_ranks,
)
from lm_eval_coupling.measuring.token_ids import token_ids
from lm_eval_coupling.numerics.memory import batches, keep_freed_memory
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.workers import usable_threads
from lm_eval_coupling.residual.tracing import equal_prompts

# Layout of a tqdm bar of prompts, which may stand between two of them.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


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
        prompts: strings (tokenized with the tokenizer's own special tokens) or token ids, as lists,
            tensors, or the output of a tokenizer; see
            :func:`~lm_eval_coupling.measuring.token_ids.token_ids`. For an image classifier, pixel
            values [channel, height, width], to be measured at its class token with ``position=0``.
        ranks: numbers K of top singular vectors, one or several, or a text such as ``10+30``.
        measures: names from docs/measures.md, such as ``depth`` or ``spectra``, or a text such as
            ``depth+swapped``.
        position: token to measure at, negative counts from the end; or several such as
            ``-1+0+last4`` or ``random8``, which give a record each.
        dtype: arithmetic of Jacobians and decompositions, ``float32`` or ``float64``.
        method: see :func:`~lm_eval_coupling.jacobians.engine.block_jacobians`.
        window: blocks of the windowed line-shape score and expodistance; by default 11, or all
            blocks of a shallower model.
        tokens: tokens of self- and context coupling: ``all``, ``lastN``, ``firstN``, ``randomN`` or
            positions such as ``0+3+-1``.
        layers: blocks of self- and context coupling: ``all``, ``spacedN`` or such as ``0+10+29``.
        trajectories: keep the principal components of all tokens' trajectories (``regularity``).
        progress: show a progress bar.

    Returns:
        One record per prompt, in order, or one per prompt and token. A prompt that cannot be
        measured gives a record whose ``reason`` says why.

    Raises:
        CouplingError: for settings that no prompt could be measured with, and if weights, modules
            or hooks of the model were replaced since it was wrapped.
    """
    require_model(model)
    position, progress = written("position", position), flag("progress", progress)
    chosen_positions(position, LONG_PROMPT)  # Raises if the text is not a choice of tokens.
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
    places = [
        (ids, token)
        for ids in token_ids(model, prompts)
        for token in chosen_positions(position, len(ids))
    ]
    records: dict[int, PromptCoupling] = {}
    with tqdm(
        total=len(places), desc="Measuring coupling", disable=not progress, bar_format=BAR
    ) as bar:
        for group in groups_of_texts(model, [ids for ids, _ in places], settings):
            group_prompts, positions = zip(*(places[i] for i in group), strict=True)
            parts = groups(model, group_prompts, settings)
            done = len(records) + len(group)
            with moving_by_blocks(bar, done, model.n_layers):
                measured = measure_prompts(model, group_prompts, positions, settings, parts)
            records.update(zip(group, measured, strict=True))
    return [records[i] for i in range(len(places))]


@contextlib.contextmanager
def moving_by_blocks(bar: tqdm, done: int, n_layers: int) -> Iterator[None]:
    """Move a bar of prompts block by block, and at the end to the prompts ``done`` by then."""

    def advance(prompts: int) -> None:
        # A batch that is halved after a failure goes through its blocks again.
        bar.update(max(0.0, min(prompts / n_layers, done - bar.n)))

    token = ON_BLOCK.set(advance)
    try:
        yield
    finally:
        ON_BLOCK.reset(token)
    bar.update(done - bar.n)


def groups(model: Model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[list[int]]:
    """Return groups of prompts to measure together, as indices.

    A group holds prompts of about the same length, as many as the device has room for.
    """
    itemsize = DTYPES[settings.dtype].itemsize
    lengths = [len(prompt) for prompt in prompts]
    return batches(model, lengths, rank=settings.ranks[-1], itemsize=itemsize)


def groups_of_texts(
    model: Model, prompts: Sequence[Sequence[int]], settings: Settings
) -> list[list[int]]:
    """Return groups of prompts to trace in one pass, as indices: equal prompts share it.

    Args:
        model: model to measure.
        prompts: token ids; a text that is measured at several tokens stands here several times.
        settings: settings of all prompts.
    """
    of_text = equal_prompts(prompts)
    texts = [prompts[indices[0]] for indices in of_text]
    return [
        [index for text in group for index in of_text[text]]
        for group in groups(model, texts, settings)
    ]


def measure_prompt(
    model: Model, tokens: Sequence[int], position: int, settings: Settings
) -> PromptCoupling:
    """Measure one prompt; a failure or a lack of memory gives a record with a reason."""
    return measure_prompts(model, [tokens], position, settings)[0]


@exact_arithmetic()
@usable_threads()
def measure_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    position: int | Sequence[int],
    settings: Settings,
    parts: Sequence[Sequence[int]] | None = None,
    on_part: Callable[[Sequence[PromptCoupling]], object] | None = None,
) -> list[PromptCoupling]:
    """Return a record of each prompt, measured together; where that fails in halves, down to one.

    Args:
        model: model to measure.
        prompts: token ids of every prompt. Equal prompts are traced once.
        position: one token of all prompts, or one for each; negative counts from the end.
        settings: settings of all prompts.
        parts: indices of the prompts whose Jacobians are held together; by default all. Every
            prompt is in one part.
        on_part: called with the records of each part once it is measured.
    """
    given = [position] * len(prompts) if isinstance(position, int) else list(position)
    positions: list[int] = []
    wrong: dict[int, dict[str, MeasureResult]] = {}
    for i, (tokens, token) in enumerate(zip(prompts, given, strict=True)):
        try:
            positions.append(resolve_token(token, len(tokens)))
        except CouplingError as error:
            positions.append(token)
            wrong[i] = _failed(settings, Reason("no_such_token", str(error)))
    records: dict[int, PromptCoupling] = {}

    def finish(results: Mapping[int, dict[str, MeasureResult]]) -> None:
        finished = {
            i: PromptCoupling(tuple(map(int, prompts[i])), positions[i], settings.ranks, by_measure)
            for i, by_measure in results.items()
        }
        records.update(finished)
        if on_part is not None and finished:
            on_part(list(finished.values()))

    finish(wrong)
    in_parts = [range(len(prompts))] if parts is None else parts
    valid = [[i for i in part if i not in wrong] for part in in_parts]
    _measure_or_halve(model, prompts, positions, settings, [p for p in valid if p], finish)
    return [records[i] for i in range(len(prompts))]


def _failed(settings: Settings, reason: Reason, seconds: float = 0.0) -> dict[str, MeasureResult]:
    share = seconds / len(settings.measures)
    return {name: MeasureResult({}, (reason,), share) for name in settings.measures}


def _measure_or_halve(
    model: Model,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    settings: Settings,
    parts: Sequence[Sequence[int]],
    finish: Callable[[Mapping[int, dict[str, MeasureResult]]], None],
) -> None:
    """Trace all parts in one pass, and measure them one by one.

    A part that fails is traced again in halves, without the others. ``finish`` is called with the
    results of prompts by measure, by index of the prompt.
    """
    start = time.perf_counter()
    failed: list[tuple[Sequence[int], Reason]] = []
    chosen = [i for part in parts for i in part]
    traces: dict[int, Trace] = {}
    try:
        traces = _traces(model, prompts, positions, settings, chosen)
    except Exception as error:
        reason = reason_of(error)
        failed = [(part, reason) for part in parts]
    for part in parts if traces else ():
        of_part = [(prompts[i], positions[i], traces[i]) for i in part]
        try:
            results = _measure_batch(model, settings, of_part, start)
        except Exception as error:
            failed.append((part, reason_of(error)))
        else:
            finish(dict(zip(part, results, strict=True)))
        start = time.perf_counter()
    # Outside the handlers: their tracebacks hold a failed batch, and the halves need that memory.
    was_traced, traces, of_part = bool(traces), {}, []
    if any(reason.code == "out_of_memory" for _, reason in failed):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for part, reason in failed:
        # The traces of the other parts may have taken the memory, or one of them the whole pass.
        if len(parts) > 1 and (reason.code == "out_of_memory" or not was_traced):
            pieces = [part]
        elif len(part) == 1:
            finish({part[0]: _failed(settings, reason, time.perf_counter() - start)})
            continue
        else:
            pieces = [part[: len(part) // 2], part[len(part) // 2 :]]
        for piece in pieces:
            _measure_or_halve(model, prompts, positions, settings, [piece], finish)


@torch.no_grad()
def _traces(
    model: Model,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    settings: Settings,
    chosen: Sequence[int],
) -> dict[int, Trace]:
    """Trace the chosen prompts with what their Jacobians need; return the traces by index."""
    if not chosen:
        return {}
    if model.device.type == "cpu":
        keep_freed_memory()
    tokens = None
    if any(registered_measures()[name].jacobians for name in settings.measures):
        tokens = [positions[i] for i in chosen]
    traced = model.traces([prompts[i] for i in chosen], DTYPES[settings.dtype], tokens, probe)
    return dict(zip(chosen, traced, strict=True))


@torch.no_grad()
def _measure_batch(
    model: Model,
    settings: Settings,
    traced: Sequence[tuple[Sequence[int], int, Trace]],
    start: float,
) -> list[dict[str, MeasureResult]]:
    """Return the results of each prompt of a batch, by measure.

    ``traced`` has the token ids, the measured token and the trace of each. They share equally the
    seconds since ``start``.
    """
    prompts, positions, traces = zip(*traced, strict=True)
    batch = Batch(model, prompts, positions, settings=settings, traces=traces)
    measures = {name: registered_measures()[name] for name in settings.measures}
    # Measures of the Jacobians J_tt go first: their memory is released before the others begin.
    names = sorted(measures, key=lambda name: not measures[name].jacobians)
    if measures[names[0]].jacobians:
        batch.blocks  # noqa: B018 computed here, because a failure concerns the whole batch
    shared_seconds = (time.perf_counter() - start) / len(batch)
    results: dict[str, list[MeasureResult]] = {}
    for name in names:
        if not measures[name].jacobians:
            batch.forget_jacobians()
        results[name] = [measures[name].cast(result) for result in measures[name].run(batch)]
    results[names[0]] = [
        dataclasses.replace(result, seconds=result.seconds + shared_seconds)
        for result in results[names[0]]
    ]
    return [{name: results[name][i] for name in measures} for i in range(len(batch))]
