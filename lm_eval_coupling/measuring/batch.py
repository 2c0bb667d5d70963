"""Prompts measured together, and what measures share of them: traces, Jacobians and singular triplets, each made once."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import Reason, Unmeasurable, reason_of
from lm_eval_coupling.jacobians.certify import DTYPES, TOLERANCE, probe
from lm_eval_coupling.jacobians.engine import BlockJacobians, jacobians_of_traces
from lm_eval_coupling.jacobians.protocol import Model
from lm_eval_coupling.measures.registry import MeasureResult
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.devices import off_mps
from lm_eval_coupling.numerics.spectra import SingularTriplets, top_singular
from lm_eval_coupling.numerics.transfer import on_host
from lm_eval_coupling.residual import sublayers as halves

logger = logging.getLogger("lm_eval.coupling")


class DoubtfulJacobian(Unmeasurable):
    """A Jacobian that fails its certificate; ``proof`` is what is recorded of it."""

    def __init__(self, words: str, proof: dict[str, Any]) -> None:
        super().__init__("certificate", words)
        self.proof = proof


class TracedPrompt:
    """One prompt of a batch at its measured token: what a measure computes from.

    Attributes:
        index: its place in the batch.
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids.
        position: the measured token, from 0.
        settings: what is measured.
        trace: every block's call of one forward pass, and the stream after the last.
    """

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch, self.index = batch, index
        self.model, self.settings = batch.model, batch.settings
        self.tokens, self.position, self.trace = (
            batch.tokens[index],
            batch.positions[index],
            batch.traces[index],
        )

    @property
    def last(self) -> int:
        """The last token that can move the measured one: in a causal model itself."""
        call = self.trace.calls[0]
        return self.position if call.causal else call.seq - 1

    @property
    def trajectory(self) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x^0 … x^L at the measured token, where float64 is to be had."""
        return self._batch.trajectories[self.index]

    @property
    def blocks(self) -> BlockJacobians:
        """J_tt of every block as it came, with certificates; :attr:`jacobians` are those that can be relied on."""
        return self._batch.blocks[self.index]

    @property
    def proof(self) -> dict[str, Any]:
        """The columns that come with every Jacobian."""
        found = self.blocks
        why = found.why or [None] * len(found.method)
        return {
            "certificate": found.certificate,
            "method": tuple(found.method),
            "slower_because": tuple(why),
        }

    @property
    def jacobians(self) -> Float[Tensor, "layer d_model d_model"]:
        """J_tt of every block.

        Raises:
            DoubtfulJacobian: if one of them disagrees with the model's own derivative.
        """
        found, tolerance = self.blocks, TOLERANCE[DTYPES[self.settings.dtype]]
        worst = int(found.certificate.nan_to_num(math.inf).argmax())
        if not found.certificate[worst] <= tolerance:
            error = f"{found.certificate[worst]:.1e} against the model's own derivative, expected at most {tolerance:.0e}"
            raise DoubtfulJacobian(
                f"the Jacobian of block {worst} ({found.method[worst]}) is off by {error}",
                self.proof,
            )
        return found.jacobians

    def attention_alone(self, call: Any) -> contextlib.AbstractContextManager[Any]:
        """One block's call without its MLP; see :func:`~lm_eval_coupling.residual.sublayers.attention_alone`."""
        return halves.attention_alone(call)

    def mlp_alone(self, call: Any) -> contextlib.AbstractContextManager[Any]:
        """One block's call with its attention held; see :func:`~lm_eval_coupling.residual.sublayers.mlp_alone`."""
        return halves.mlp_alone(call, self.position)

    @property
    def triplets(self) -> SingularTriplets:
        """One more than the largest rank asked for, so that the gap behind it is known; all where there are no more."""
        return self._batch.triplets(self.index)


class Batch:
    """Prompts measured together at one token each. Iterating gives each as a :class:`TracedPrompt`.

    Attributes:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        tokens: token ids of every prompt.
        positions: the measured token of each, from 0.
        settings: what is measured.
        traces: of one padded forward pass.
        trajectories: x^0 … x^L of every prompt at its measured token, where float64 is to be had.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        settings: Settings,
        *,
        derivative: bool,
    ) -> None:
        """Trace the prompts; ``derivative``: with the pullbacks that certify the Jacobians J_tt.

        Raises:
            Unmeasurable: if the stream of a prompt is not finite.
        """
        self.model, self.tokens, self.positions, self.settings = model, tokens, positions, settings
        self.traces = model.traces(
            tokens, DTYPES[settings.dtype], positions if derivative else None, probe
        )
        self._triplets: dict[int, SingularTriplets] = {}
        at_tokens = zip(self.traces, positions, strict=True)
        self.trajectories = [off_mps(trace.trajectory(position)) for trace, position in at_tokens]
        _require_finite(self.trajectories)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TracedPrompt]:
        # Made anew each time: kept, they and the batch would hold each other, and its memory until the next collection.
        return (TracedPrompt(self, i) for i in range(len(self)))

    @functools.cached_property
    def blocks(self) -> list[BlockJacobians]:
        """The Jacobians J_tt of every prompt with their triplets, all made together."""
        return jacobians_of_traces(self.traces, self.positions, self.settings.method, self._rank)

    @property
    def _rank(self) -> int:
        return min(self.settings.ranks[-1] + 1, self.model.d_model)

    def triplets(self, index: int) -> SingularTriplets:
        """Of the Jacobians of one prompt."""
        if index not in self._triplets:
            J = TracedPrompt(self, index).jacobians
            blocks = self.blocks[index]
            known = blocks.triplets
            self._triplets[index] = (
                top_singular(J, self._rank, device=blocks.device) if known is None else known
            )
        return self._triplets[index]

    def forget_jacobians(self) -> None:
        """Give their memory back."""
        self._triplets.clear()
        with contextlib.suppress(AttributeError):
            del self.blocks

    def measure_each(
        self, measure: Callable[[TracedPrompt], MeasureResult], name: str
    ) -> list[MeasureResult]:
        """What ``measure`` finds for each prompt; a prompt that it fails for has a reason, the others are not touched.

        Returns:
            As many as there are prompts, in their order.

        Raises:
            Exception: if memory runs out while several prompts hold it.
        """
        return [self._alone(measure, one, name) for one in self]

    def measure_together(
        self,
        measure: Callable[[Sequence[TracedPrompt]], list[MeasureResult]],
        name: str,
        at_once: int,
    ) -> list[MeasureResult]:
        """As :meth:`measure_each`, but ``measure`` takes up to ``at_once`` prompts; where it fails, each of them is measured alone.

        Returns:
            As many as there are prompts, in their order.
        """
        prompts, found = list(self), []
        for first in range(0, len(prompts), at_once):
            found += self._group(measure, prompts[first : first + at_once], name)
        return found

    def _group(
        self,
        measure: Callable[[Sequence[TracedPrompt]], list[MeasureResult]],
        prompts: Sequence[TracedPrompt],
        name: str,
    ) -> list[MeasureResult]:
        start = time.perf_counter()
        if len(prompts) > 1:
            try:
                parts = measure(prompts)
                return [
                    _on_host(part, (time.perf_counter() - start) / len(prompts)) for part in parts
                ]
            except Exception:
                logger.debug(
                    "coupling: %s of %d prompts at once failed, each is measured alone",
                    name,
                    len(prompts),
                    exc_info=True,
                )
        return [self._alone(lambda one: measure([one])[0], one, name) for one in prompts]

    def _alone(
        self, measure: Callable[[TracedPrompt], MeasureResult], one: TracedPrompt, name: str
    ) -> MeasureResult:
        start = time.perf_counter()
        try:
            part = measure(one)
        except DoubtfulJacobian as error:  # it says the same for every measure that needs it
            part = MeasureResult(error.proof, (error.reason,))
        except Exception as error:
            reason = reason_of(error)
            if reason.code == "out_of_memory" and len(self) > 1:
                raise
            part = MeasureResult({}, (Reason(reason.code, f"no {name}: {reason.words}"),))
        return _on_host(part, time.perf_counter() - start)


def _on_host(part: MeasureResult, seconds: float) -> MeasureResult:
    return MeasureResult(
        {column: on_host(value) for column, value in part.columns.items()}, part.reasons, seconds
    )


def _require_finite(trajectories: Sequence[Float[Tensor, "layer_plus_1 d_model"]]) -> None:
    """Read from the device once for all prompts."""
    finite = torch.isfinite(torch.stack(list(trajectories))).all(dim=-1).cpu()
    if not finite.all():
        layer = int((~finite).nonzero()[0, 1])
        where = "the embeddings are" if layer == 0 else f"the output of block {layer - 1} is"
        raise Unmeasurable("not_finite", f"{where} not finite")
