"""Seconds that one real measurement spends in each of its stages."""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from timing import synchronize

from lm_eval_coupling.jacobians import levels as jacobians
from lm_eval_coupling.jacobians import stack
from lm_eval_coupling.measures import depth, regularity, swapped
from lm_eval_coupling.measuring import batch
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.numerics.workers import workers
from lm_eval_coupling.residual import ResidualModel

# Where each stage is entered. What runs inside another stage counts for the inner one only, so the
# pairs are what is left of the depth-wise measurement.
ENTRANCES = {
    "trace": (ResidualModel, "traces"),
    "certify": (jacobians.Truth, "of"),
    "certify together": (jacobians, "certify_each"),
    "jacobians": (batch, "jacobians_of_traces"),
    "spectra": (stack, "top_singular"),
    "pairs": (depth, "_measure"),
    "swapped pairs": (swapped, "_measure"),
    "regularity": (regularity, "_measure"),
}


@contextlib.contextmanager
def stopwatch() -> Iterator[Counter]:
    """Collect seconds by stage of every measurement made inside.

    The code measured is what users run. Stages that workers run side by side count for the time
    that they take together.
    """
    spent: Counter = Counter()
    by_workers: Counter = Counter()
    main, lock = threading.get_ident(), threading.Lock()
    inner = [0.0]  # seconds of stages inside the open ones of the main thread

    def timed(stage, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            if threading.get_ident() != main:
                start = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    with lock:
                        by_workers[stage] += time.perf_counter() - start
            inner.append(0.0)
            synchronize()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                total = time.perf_counter() - start
                spent[stage] += total - inner.pop()
                inner[-1] += total

        return run

    with contextlib.ExitStack() as undo:
        for stage, (owner, name) in ENTRANCES.items():
            original = getattr(owner, name)
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, timed(stage, original))
        yield spent
    for stage, seconds in by_workers.items():
        spent[stage] += seconds / workers()
        if stage == "certify together":  # it runs inside the Jacobians
            spent["jacobians"] -= seconds / workers()


def measured(
    model: ResidualModel, prompts: Sequence[Sequence[int]], settings
) -> tuple[list[PromptCoupling], dict[str, float]]:
    """The prompts' records, measured together as a run does, with the mean seconds of a prompt by
    stage and in ``total``.

    ``trace`` is the forward pass with the certificate.

    A prompt that cannot be measured ends the benchmark.
    """
    records = {}
    with stopwatch() as spent:
        synchronize()
        start = time.perf_counter()
        for together in measure.groups(model, prompts, settings):
            found = measure.measure_prompts(model, [prompts[i] for i in together], -1, settings)
            records.update(zip(together, found, strict=True))
        synchronize()
        total = time.perf_counter() - start
    for record in records.values():
        if record.certificate is None or record.normalized_miscoupling is None:
            raise SystemExit(
                f"the prompt of {len(record.tokens)} tokens could not be measured: {record.reason}"
            )
    seconds = {stage: spent[stage] for stage in ENTRANCES} | {"total": total}
    # Short prompts are pulled back during the trace, long ones when certified.
    seconds["trace"] += seconds.pop("certify") + seconds.pop("certify together")
    seconds["pairs"] += seconds.pop("swapped pairs")
    return [records[i] for i in sorted(records)], {
        stage: spent / len(prompts) for stage, spent in seconds.items()
    }


def median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of each stage over several runs."""
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
