"""Batches of prompts with the traces, Jacobians and triplets that their measures share."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import Reason, Unmeasurable, reason_of
from lm_eval_coupling.jacobians.certify import DTYPES, TOLERANCE
from lm_eval_coupling.jacobians.engine import BlockJacobians, jacobians_of_traces
from lm_eval_coupling.jacobians.protocol import Model
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.devices import off_mps
from lm_eval_coupling.numerics.memory import block_workers, pair_workers
from lm_eval_coupling.numerics.spectra import SingularTriplets, top_singular
from lm_eval_coupling.numerics.transfer import on_host
from lm_eval_coupling.numerics.workers import run_each
from lm_eval_coupling.residual import sublayers

logger = logging.getLogger("lm_eval.coupling")

# Function to call, from any thread, with a number of prompts after one more block of theirs.
ON_BLOCK: ContextVar[Callable[[int], object] | None] = ContextVar("on_block", default=None)


class DoubtfulJacobian(Unmeasurable):
    """Jacobian that fails its certificate; ``proof`` holds the columns that are recorded."""

    def __init__(self, words: str, proof: dict[str, Any]) -> None:
        super().__init__("certificate", words)
        self.proof = proof


class TracedPrompt:
    """Prompt of a batch at its measured token, from which measures compute.

    Attributes:
        index: place of the prompt in its batch.
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids.
        position: measured token, from 0.
        settings: settings of the batch.
        trace: calls of all blocks in one forward pass, and the stream after the last block.
    """

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch, self.index = batch, index
        self.model, self.settings = batch.model, batch.settings
        self.tokens, self.position = batch.tokens[index], batch.positions[index]
        self.trace = batch.traces[index]

    @property
    def last(self) -> int:
        """Last token that can move the measured one: in a causal model itself."""
        call = self.trace.calls[0]
        return self.position if call.causal else call.seq - 1

    @property
    def trajectory(self) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x^0 … x^L at the measured token, on a device that has float64."""
        return self._batch.trajectories[self.index]

    @property
    def blocks(self) -> BlockJacobians:
        """J_tt of every block with its certificate, whether or not it can be trusted."""
        return self._batch.blocks[self.index]

    @property
    def proof(self) -> dict[str, Any]:
        """Columns that come with every Jacobian."""
        blocks = self.blocks
        return {
            "certificate": blocks.certificate,
            "method": tuple(blocks.method),
            "slower_because": tuple(blocks.why or [None] * len(blocks.method)),
        }

    @property
    def jacobians(self) -> Float[Tensor, "layer d_model d_model"]:
        """J_tt of every block.

        Raises:
            DoubtfulJacobian: if one of them disagrees with the model's own derivative.
        """
        blocks, tolerance = self.blocks, TOLERANCE[DTYPES[self.settings.dtype]]
        worst = int(blocks.certificate.nan_to_num(math.inf).argmax())
        if not blocks.certificate[worst] <= tolerance:
            raise DoubtfulJacobian(
                f"the Jacobian of block {worst} ({blocks.method[worst]}) is off by "
                f"{blocks.certificate[worst]:.1e} against the model's own derivative, "
                f"expected at most {tolerance:.0e}",
                self.proof,
            )
        return blocks.jacobians

    @property
    def triplets(self) -> SingularTriplets:
        """Top triplets of each block: one more than the largest rank, so that its gap is known.

        At rank d_model there is no further triplet.
        """
        return self._batch.triplets(self.index)

    def attention_alone(self, call: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a block's call is cut to its attention."""
        return sublayers.attention_alone(call)

    def mlp_alone(self, call: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a block's call is cut to its MLP at the measured token."""
        return sublayers.mlp_alone(call, self.position)


class Batch:
    """Prompts that are measured together, at one token each.

    Attributes:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids of every prompt.
        positions: measured token of each prompt, from 0.
        settings: settings of all prompts.
        traces: traces of the prompts; equal prompts at several tokens share a pass.
        trajectories: x^0 … x^L of every prompt at its measured token, on a device with float64.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        settings: Settings,
        traces: Sequence[Any],
    ) -> None:
        """Take traced prompts; each trace has the pullback that certifies the Jacobians J_tt.

        Raises:
            Unmeasurable: if the stream of a prompt is not finite.
        """
        self.model, self.tokens, self.positions, self.settings = model, tokens, positions, settings
        self.traces = traces
        self._triplets: dict[int, SingularTriplets] = {}
        at_tokens = zip(self.traces, positions, strict=True)
        self.trajectories = [off_mps(trace.trajectory(position)) for trace, position in at_tokens]
        _require_finite(self.trajectories)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.tokens)

    def __iter__(self) -> Iterator[TracedPrompt]:
        """Iterate over the prompts."""
        # New objects each time: a prompt refers to its batch, and a cycle would keep its memory.
        return (TracedPrompt(self, i) for i in range(len(self)))

    @functools.cached_property
    def blocks(self) -> list[BlockJacobians]:
        """Jacobians J_tt of every prompt with their triplets, computed together."""
        itemsize = DTYPES[self.settings.dtype].itemsize
        side_by_side = block_workers(self.model, len(self), itemsize)
        on_block = ON_BLOCK.get()
        return jacobians_of_traces(
            self.traces,
            self.positions,
            self.settings.method,
            self._rank,
            side_by_side,
            on_block and functools.partial(on_block, len(self)),
        )

    @property
    def _rank(self) -> int:
        return min(self.settings.ranks[-1] + 1, self.model.d_model)

    def triplets(self, index: int) -> SingularTriplets:
        """Return the triplets of one prompt's Jacobians."""
        if index not in self._triplets:
            J = TracedPrompt(self, index).jacobians
            blocks = self.blocks[index]
            self._triplets[index] = (
                top_singular(J, self._rank, device=blocks.device)
                if blocks.triplets is None
                else blocks.triplets
            )
        return self._triplets[index]

    def forget_jacobians(self) -> None:
        """Release the memory of Jacobians and triplets."""
        self._triplets.clear()
        with contextlib.suppress(AttributeError):
            del self.blocks

    def measure_each(
        self, measure: Callable[[TracedPrompt], MeasureResult], name: str
    ) -> list[MeasureResult]:
        """Return one result for each prompt: ``measure`` is applied to one prompt at a time.

        A prompt that fails gets a reason; the others are not affected.

        Raises:
            Exception: if memory runs out while several prompts hold it.
        """
        return [self._measure_alone(measure, prompt, name) for prompt in self]

    def measure_together(
        self,
        measure: Callable[[Sequence[TracedPrompt]], list[MeasureResult]],
        name: str,
        at_once: int,
    ) -> list[MeasureResult]:
        """Return one result for each prompt, in order.

        Args:
            measure: applied to groups of prompts; several groups are measured side by side where
                cores and memory allow. Where it fails, each prompt of the group is measured alone.
            name: of the measure, for messages.
            at_once: number of prompts in a group, at least 1.
        """
        prompts = list(self)
        groups = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        itemsize = DTYPES[self.settings.dtype].itemsize
        side_by_side = pair_workers(self.model, self._rank, itemsize)
        results = run_each(
            lambda group: self._measure_group(measure, group, name), groups, side_by_side
        )
        return [result for group in results for result in group]

    def _measure_group(
        self,
        measure: Callable[[Sequence[TracedPrompt]], list[MeasureResult]],
        prompts: Sequence[TracedPrompt],
        name: str,
    ) -> list[MeasureResult]:
        start = time.perf_counter()
        if len(prompts) > 1:
            try:
                results = measure(prompts)
                seconds = (time.perf_counter() - start) / len(prompts)
                return [_on_host(result, seconds) for result in results]
            except Exception:
                logger.debug(
                    "coupling: %s of %d prompts at once failed, each is measured alone",
                    name,
                    len(prompts),
                    exc_info=True,
                )
        return [
            self._measure_alone(lambda prompt: measure([prompt])[0], prompt, name)
            for prompt in prompts
        ]

    def _measure_alone(
        self, measure: Callable[[TracedPrompt], MeasureResult], prompt: TracedPrompt, name: str
    ) -> MeasureResult:
        start = time.perf_counter()
        try:
            result = measure(prompt)
        except DoubtfulJacobian as error:  # Its words are the same for every measure.
            result = MeasureResult(error.proof, (error.reason,))
        except Exception as error:
            reason = reason_of(error)
            if reason.code == "out_of_memory" and len(self) > 1:
                raise
            result = MeasureResult({}, (Reason(reason.code, f"no {name}: {reason.words}"),))
        return _on_host(result, time.perf_counter() - start)


def _on_host(result: MeasureResult, seconds: float) -> MeasureResult:
    columns = {name: on_host(value) for name, value in result.columns.items()}
    return MeasureResult(columns, result.reasons, seconds)


def _require_finite(trajectories: Sequence[Float[Tensor, "layer_plus_1 d_model"]]) -> None:
    """Require finite trajectories, with one transfer from the device for all prompts."""
    finite = torch.isfinite(torch.stack(list(trajectories))).all(dim=-1).cpu()
    if not finite.all():
        layer = int((~finite).nonzero()[0, 1])
        where = "the embeddings are" if layer == 0 else f"the output of block {layer - 1} is"
        raise Unmeasurable("not_finite", f"{where} not finite")
