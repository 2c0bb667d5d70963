"""Comparisons of traces of measured prompts with the scored model's own passes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError, Unmeasurable, pass_on_lack_of_memory
from lm_eval_coupling.residual.arguments import CACHES
from lm_eval_coupling.residual.block import PassState
from lm_eval_coupling.residual.load_checks import (
    HALF,
    OTHER_KERNELS,
    PACKED,
    ROUNDED,
    SAME,
    SAME_KERNELS,
    largest,
    nearest_token,
    off_by,
)
from lm_eval_coupling.residual.scored_passes import (
    ScoredPasses,
    autocast_to_own,
    parameters_of,
    run_plainly,
    streams_after,
)
from lm_eval_coupling.residual.stamp import Glance
from lm_eval_coupling.residual.trace import ResidualTrace
from lm_eval_coupling.residual.weights import float_dtype

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")

_CLOSE = 2e-2  # in half precision: nearer than this, two arithmetics need no second opinion


@dataclasses.dataclass
class ScoredModel(ScoredPasses):
    """The model that a :class:`.model.ResidualModel` was made of, run up to its last block.

    Attributes:
        glance: the part of its state that its twin does not follow.
        probed: the stream after the last block for the probe.
        last_name: name of its last block in the model inside the wrappers.
        retraced: makes a model that runs, and traces, by the kernels that score.
        in_batches: whether prompts are compared in a batch as well.
        warns_of_text_behind: whether a warning is due if text behind a token changes it.
    """

    glance: Glance
    probed: Float[Tensor, "1 seq d_model"]
    last_name: str
    retraced: Callable[[], Any]
    in_batches: bool = False
    warns_of_text_behind: bool = False

    def follow_scoring(self, in_batches: bool) -> None:
        """Take note of how the model scores, and refuse functions that go by places in a batch.

        From now on a function of the user that acts otherwise on a token once text follows it is
        warned of.

        Args:
            in_batches: True if several prompts are scored in one pass.

        Raises:
            CouplingError: if functions act otherwise on two equal prompts in one pass.
        """
        self.in_batches = in_batches and self.has_own_functions
        self.warns_of_text_behind = self.has_own_functions and self.inputs.causal
        if self.in_batches:
            try:
                (scored,) = self.final([self.inputs.probe])
                self._require_same_in_batches(self.inputs.probe, [-1], scored)
            except Unmeasurable as refusal:
                raise CouplingError(f"got a {self.name} with {refusal}") from None

    def require_unchanged(self) -> None:
        """Refuse to measure what the model was before a change that its twin does not follow.

        Raises:
            CouplingError: if a weight, module, hook, function or adapter is another one.
        """
        current = Glance.at(self.model, self.stamp.ignored, with_weights=self.is_present)
        if (name := self.glance.change_to(current)) is not None:
            raise CouplingError(
                f"got a model whose {name} is not the one that was wrapped, expected the same; "
                "wrap the changed model anew with ResidualModel.wrap"
            )

    def require_agreement(self, prompt: Any, tokens: Sequence[int], trace: ResidualTrace) -> None:
        """Refuse a prompt whose traced stream is not the one that the scored model computes.

        Costs one pass without derivatives, in evaluation mode. In half precision, where float32
        arithmetic is further away than rounding, two more decide: by the kernels that score, in
        half precision against the scored model and in float32 against the trace.

        Raises:
            Unmeasurable: if the stream after the last block differs at a measured token.
        """
        resid_final = trace.resid_final
        (scored,) = self.final([prompt])
        error = _most_off(resid_final[0], scored, tokens)
        tolerance = OTHER_KERNELS if self.is_present else PACKED
        if self.is_present and self.rounds and error > _CLOSE:
            again = self.retraced()
            last = again.model.get_submodule(self.last_name)
            error = _most_off(self.final_of(again.model, last, [prompt])[0], scored, tokens)
            tolerance = SAME_KERNELS
            with contextlib.suppress(RuntimeError):  # kernels for bf16 and fp16 only
                exact = again.trace(prompt, resid_final.dtype).resid_final[0]
                other = _most_off(resid_final[0], exact, tokens)
                error = error if other <= OTHER_KERNELS else other
        elif self.rounds:
            tolerance = max(tolerance, _CLOSE)
        if not error <= tolerance:
            raise Unmeasurable(
                "refused",
                f"the stream after the last block is off by {error:.1e} from what {self.name} "
                "computes when it scores this prompt, expected the same: a part of the model acts "
                "on this prompt in a way that its blocks alone do not",
            )
        if self.has_own_functions and self.rounds and self.is_present:
            self._require_same_blocks(prompt, trace)
        if self.has_own_code:
            self.require_same_in_every_mode(prompt, tokens, scored)
        if self.in_batches:
            self._require_same_in_batches(prompt, tokens, scored)
        if self.warns_of_text_behind and self._changes_with_text_behind(prompt, tokens, scored):
            self.warns_of_text_behind = False
            logger.warning(
                "coupling: hooks or functions act otherwise on a measured token once text follows "
                "it, as it does where log-likelihoods are scored; coupling is that of the prompt "
                "alone"
            )

    @torch.no_grad()
    def _require_same_blocks(self, prompt: Any, trace: ResidualTrace) -> None:
        """Refuse hooks and functions that go by the dtype: they act when scored, or when measured.

        Rounding adds up over blocks and hides them in the last stream. One block of the trace is
        therefore given what the scored one was given. Experts may be others after rounding, hence
        the nearest token counts.

        Raises:
            Unmeasurable: if one block differs at every token.
        """
        for call, (before, after) in zip(
            trace.calls, self.streams_through(prompt, trace), strict=True
        ):
            with call.ready():
                output = call(before.to(call.resid_pre))[0]
            before, after = before[0].to(output), after[0].to(output)
            size = (after - before).norm(dim=-1) + 0.2 * after.norm(dim=-1)
            token = nearest_token(output, after, size)
            error = ((output - after)[token].norm() / size[token]).item()
            # A stream without numbers is reported with the prompt, so that its score is kept.
            if after[token].isfinite().all() and not error <= ROUNDED:
                raise Unmeasurable(
                    "refused",
                    f"block {call.layer} in {call.dtype} is off by {error:.1e} from the one that "
                    f"is scored in {float_dtype(self.model)}, expected a difference of rounding; "
                    "take dtypes out of the conditions of hooks and functions",
                )

    @torch.no_grad()
    def require_same_in_every_mode(
        self, prompt: Any, tokens: Iterable[int], scored: Float[Tensor, "seq d_model"]
    ) -> None:
        """Refuse hooks and functions that go by modes of torch, in which others may score.

        Costs a pass in inference mode and one under autocast. A mode in which a pass fails is left
        out, as nothing is scored in it. The model's attributes and buffers are put back.

        Args:
            prompt: what the model is run on.
            tokens: where the stream after the last block is compared.
            scored: that stream outside these modes.

        Raises:
            Unmeasurable: if the stream differs in one of the modes.
        """
        state = PassState(self.model.modules())
        casting = autocast_to_own(self.device.type, float_dtype(self.model))
        for name, mode, tolerance in (
            ("inference_mode", torch.inference_mode(), SAME),
            # Autocast computes softmax and norms of a model in half precision in float32.
            ("autocast", casting, self._tolerance(SAME)),
        ):
            try:
                with mode:
                    (stream,) = self.final([prompt])
            except Exception as failure:
                pass_on_lack_of_memory(failure)
                continue  # such as autocast of float64: nothing is scored so
            finally:
                state.restore()
            if not (error := _most_off(stream, scored, tokens)) <= tolerance:
                raise Unmeasurable(
                    "refused",
                    f"the stream after the last block is off by {error:.1e} under torch.{name}, "
                    "expected the same as under torch.no_grad; take modes of torch out of the "
                    "conditions of hooks and functions",
                )

    def _tolerance(self, whole: float) -> float:
        """Return the tolerance between two passes; ``whole`` that of weights without rounding."""
        return HALF if self.rounds or not self.is_present else whole

    def _require_same_in_batches(
        self, prompt: Any, tokens: Sequence[int], scored: Float[Tensor, "seq d_model"]
    ) -> None:
        """Refuse hooks and functions that go by the place of a prompt in a batch.

        Raises:
            Unmeasurable: if a prompt beside itself has another stream than alone.
        """
        streams = self.final([prompt, prompt])
        error = largest(_most_off(stream, scored, tokens) for stream in streams)
        if not error <= self._tolerance(OTHER_KERNELS):
            raise Unmeasurable(
                "refused",
                f"a stream after the last block that is off by {error:.1e} in a batch of two, "
                "expected the same as alone; evaluate with batch_size=1, or take places in the "
                "batch out of hooks and functions",
            )

    def _changes_with_text_behind(
        self, prompt: Sequence[int], tokens: Sequence[int], scored: Float[Tensor, "seq d_model"]
    ) -> bool:
        """Return whether functions of the user act otherwise on tokens once text follows them.

        Log-likelihoods are scored with the continuation behind the prompt.
        """
        try:
            (longer,) = self.final([[*prompt, prompt[-1]]])
        except Exception as error:  # the prompt fills the model's window
            pass_on_lack_of_memory(error)
            return False
        off = _most_off(longer[: len(prompt)], scored, tokens)
        return not off <= self._tolerance(OTHER_KERNELS)

    @torch.no_grad()
    def require_same_when_generated(self, tokens: Sequence[int], start: int) -> None:
        """Refuse a response that was generated otherwise than one pass over the text computes.

        Hooks may act on steps of decoding alone. Costs a step for each token from ``start`` on.

        Raises:
            Unmeasurable: if the stream after the last block differs at a token of the response.
        """
        if not (name := next((name for name in CACHES if name in parameters_of(self.model)), "")):
            return  # such a model generates by passes over the text
        (at_once,) = self.final([tokens])
        cache: Any = None
        with run_plainly(self.model), streams_after(self.last_block) as streams:
            for part in (tokens[:start], *([token] for token in tokens[start:])):
                ids = torch.tensor([part], device=self.device)
                output = self.model(input_ids=ids, use_cache=True, **{name: cache})
                if (cache := getattr(output, name, None)) is None:
                    return
        stepwise = torch.cat(streams, dim=1)[0].float()
        error = _most_off(stepwise, at_once, range(start, len(tokens)))
        if not error <= (ROUNDED if self.rounds else OTHER_KERNELS):
            raise Unmeasurable(
                "refused",
                f"the stream of a generated token is off by {error:.1e} from what one pass over "
                "prompt and response computes, expected the same: a hook acts otherwise on steps "
                "of decoding",
            )


def _most_off(
    stream: Float[Tensor, "seq d_model"],
    scored: Float[Tensor, "seq d_model"],
    tokens: Iterable[int],
) -> float:
    """Return the largest relative difference at one of the tokens; NaN if one is NaN."""
    return largest(off_by(stream[token], scored[token]) for token in tokens)
