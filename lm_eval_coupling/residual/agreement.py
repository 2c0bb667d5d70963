"""The scored model's own passes, with which traces of measured prompts are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, Unmeasurable, pass_on_lack_of_memory
from lm_eval_coupling.residual import rotary
from lm_eval_coupling.residual.arguments import CACHES
from lm_eval_coupling.residual.attachments import (
    has_own_classes,
    has_own_functions,
    uncompiled,
)
from lm_eval_coupling.residual.block import PassState
from lm_eval_coupling.residual.block_call import hidden
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.load_checks import (
    HALF,
    OTHER_KERNELS,
    PACKED,
    ROUNDED,
    SAME,
    SAME_KERNELS,
    off_by,
)
from lm_eval_coupling.residual.scored import evaluation_mode
from lm_eval_coupling.residual.stamp import Glance, Stamp
from lm_eval_coupling.residual.weights import float_dtype

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")

_CLOSE = 2e-2  # in half precision: nearer than this, two arithmetics need no second opinion


@dataclasses.dataclass
class ScoredModel:
    """The model that a :class:`.model.ResidualModel` was made of, run up to its last block.

    Attributes:
        name: its class.
        model: as it is scored, wrappers included.
        stamp: its state when it was wrapped.
        glance: the part of its state that its twin does not follow.
        probed: the stream after the last block for the probe.
        last_block: its last block, by the block's name in the model inside the wrappers.
        inputs: what the model is run on.
        device: where the stream begins.
        retraced: makes a model that runs, and traces, by the kernels that score.
        rounds: whether its weights are in half precision.
        is_present: whether its weights are numbers on one device.
        in_batches: whether prompts are compared in a batch as well.
        warns_of_text_behind: whether a warning is due if text behind a token changes it.
    """

    name: str
    model: nn.Module
    stamp: Stamp
    glance: Glance
    probed: Float[Tensor, "1 seq d_model"]
    last_block: nn.Module
    last_name: str
    inputs: Inputs
    device: torch.device
    retraced: Callable[[], Any]
    rounds: bool
    is_present: bool
    in_batches: bool = False
    warns_of_text_behind: bool = False

    def follow_scoring(self, in_batches: bool) -> None:
        """Compare what functions of the user do to a prompt alone with what they do in scoring.

        A function that goes by places in the batch is refused. One that acts otherwise on a token
        once text follows it is warned of.

        Args:
            in_batches: True if several prompts are scored in one pass.

        Raises:
            CouplingError: if functions act otherwise on two equal prompts in one pass.
        """
        self.in_batches = in_batches and self.has_own_functions
        self.warns_of_text_behind = self.has_own_functions and self.inputs.causal
        if self.in_batches:
            try:
                self._require_same_in_batches(self.inputs.probe, [-1])
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

    @property
    def has_own_functions(self) -> bool:
        """True if hooks or other functions of the user take part in a pass."""
        return has_own_functions(self.stamp.attached)

    @property
    def has_own_code(self) -> bool:
        """True if functions of the user, or classes such as remote code, take part in a pass."""
        return self.has_own_functions or has_own_classes(self.stamp.attached)

    def require_agreement(
        self, prompt: Any, tokens: Sequence[int], resid_final: Float[Tensor, "1 seq d_model"]
    ) -> None:
        """Refuse a prompt whose traced stream is not the one that the scored model computes.

        Costs one pass without derivatives, in evaluation mode. In half precision, where float32
        arithmetic is further away than rounding, two more decide: by the kernels that score, in
        half precision against the scored model and in float32 against the trace.

        Raises:
            Unmeasurable: if the stream after the last block differs at a measured token.
        """
        scored = self._final(self.model, self.last_block, [prompt])[0]
        error = _most_off(resid_final[0], scored, tokens)
        tolerance = OTHER_KERNELS if self.is_present else PACKED
        if self.is_present and self.rounds and error > _CLOSE:
            again = self.retraced()
            last = again.model.get_submodule(self.last_name)
            error = _most_off(self._final(again.model, last, [prompt])[0], scored, tokens)
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
        if self.has_own_code:
            self.require_same_in_every_mode(prompt, tokens, scored)
        if self.in_batches:
            self._require_same_in_batches(prompt, tokens)
        if self.warns_of_text_behind and self._changes_with_text_behind(prompt, tokens):
            self.warns_of_text_behind = False
            logger.warning(
                "coupling: hooks or functions act otherwise on a measured token once text follows "
                "it, as it does where log-likelihoods are scored; coupling is that of the prompt "
                "alone"
            )

    @torch.no_grad()
    def require_same_in_every_mode(
        self,
        prompt: Any,
        tokens: Iterable[int],
        scored: Float[Tensor, "seq d_model"] | None = None,
    ) -> None:
        """Refuse hooks and functions that go by modes of torch, in which others may score.

        Costs a pass in every mode. The model's attributes and buffers are put back.

        Args:
            prompt: what the model is run on.
            tokens: where the stream after the last block is compared.
            scored: that stream outside these modes, computed if it is not given.

        Raises:
            Unmeasurable: if the stream differs in one of the modes.
        """
        if scored is None:
            scored = self._final(self.model, self.last_block, [prompt])[0]
        state = PassState(self.model.modules())
        casting = _autocast_to_own(self.device.type, float_dtype(self.model))
        # Autocast computes softmax and norms of a model in half precision in float32.
        tolerance = HALF if self.rounds or not self.is_present else SAME
        for name, mode, most in (
            ("inference_mode", torch.inference_mode(), SAME),
            ("autocast", casting, tolerance),
        ):
            try:
                with mode:
                    stream = self._final(self.model, self.last_block, [prompt])[0]
            except Exception as failure:
                pass_on_lack_of_memory(failure)
                continue  # such as autocast of float64: nothing is scored so
            finally:
                state.restore()
            if not (error := _most_off(stream, scored, tokens)) <= most:
                raise Unmeasurable(
                    "refused",
                    f"the stream after the last block is off by {error:.1e} under torch.{name}, "
                    "expected the same as under torch.no_grad; take modes of torch out of the "
                    "conditions of hooks and functions",
                )

    @torch.no_grad()
    def _require_same_in_batches(self, prompt: Any, tokens: Sequence[int]) -> None:
        """Refuse hooks and functions that go by the place of a prompt in a batch.

        Raises:
            Unmeasurable: if a prompt beside itself has another stream than alone.
        """
        alone = self._final(self.model, self.last_block, [prompt])[0]
        streams = self._final(self.model, self.last_block, [prompt, prompt])
        error = max(_most_off(stream, alone, tokens) for stream in streams)
        if not error <= (HALF if self.rounds or not self.is_present else OTHER_KERNELS):
            raise Unmeasurable(
                "refused",
                f"a stream after the last block that is off by {error:.1e} in a batch of two, "
                "expected the same as alone; evaluate with batch_size=1, or take places in the "
                "batch out of hooks and functions",
            )

    @torch.no_grad()
    def _changes_with_text_behind(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Return whether functions of the user act otherwise on tokens once text follows them.

        Log-likelihoods are scored with the continuation behind the prompt.
        """
        alone = self._final(self.model, self.last_block, [prompt])[0]
        try:
            longer = self._final(self.model, self.last_block, [[*prompt, prompt[-1]]])[0]
        except Exception as error:  # the prompt fills the model's window
            pass_on_lack_of_memory(error)
            return False
        off = _most_off(longer[: len(prompt)], alone, tokens)
        return not off <= (HALF if self.rounds or not self.is_present else OTHER_KERNELS)

    @torch.no_grad()
    def require_same_when_generated(self, tokens: Sequence[int], start: int) -> None:
        """Refuse a response that was generated otherwise than one pass over the text computes.

        Hooks may act on steps of decoding alone. Costs a step for each token from ``start`` on.

        Raises:
            Unmeasurable: if the stream after the last block differs at a token of the response.
        """
        if not (name := next((name for name in CACHES if name in _parameters(self.model)), "")):
            return  # such a model generates by passes over the text
        at_once = self._final(self.model, self.last_block, [tokens])[0]
        cache: Any = None
        with _streams_after(self.last_block, self.model) as streams:
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

    @torch.no_grad()
    def _final(self, model: nn.Module, last: nn.Module, prompts: Sequence[Any]) -> Tensor:
        """Return the stream [prompt, seq, d_model] after a model's last block, in float32.

        Functions of the user may go by the arguments: the model is given those of scoring then.
        """
        batch = self.inputs.batch(prompts, self.device, float_dtype(model))
        with _streams_after(last, model) as streams:
            if self.has_own_functions:
                args, kwargs = self.inputs.as_scored(batch.arguments)
                model(*args, **kwargs)
            elif "logits_to_keep" in _parameters(model):
                model(**batch.arguments, logits_to_keep=1)
            if not streams or (batch.lengths and streams[-1].shape[1] != batch.lengths[0]):
                # Gemma 4's last blocks run the tokens alone whose logits are kept.
                model(**batch.arguments)
        return streams[-1].float()


@contextlib.contextmanager
def _streams_after(block: nn.Module, model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the streams after a block, while the model runs plainly and without dropout."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        streams.append(hidden(output).detach().clone())

    with uncompiled_forwards(model), rotary.unused_tables(model), evaluation_mode(model):
        with block.register_forward_hook(keep):
            yield streams


@contextlib.contextmanager
def _autocast_to_own(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Switch autocast on, to the dtype of the weights: it hardly changes the arithmetic.

    ``torch.autocast`` refuses float32.
    """
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def _most_off(
    stream: Float[Tensor, "seq d_model"],
    scored: Float[Tensor, "seq d_model"],
    tokens: Iterable[int],
) -> float:
    """Return the largest relative difference at one of the tokens; NaN if one is NaN."""
    errors = [off_by(stream[token], scored[token]) for token in tokens]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _parameters(model: nn.Module) -> Collection[str]:
    """Return the names of the arguments of the model inside PEFT's."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(inner).forward).parameters.keys()


@contextlib.contextmanager
def uncompiled_forwards(model: nn.Module) -> Iterator[None]:
    """Run what torch.compile has wrapped as it was: prompts of every length would be compiled."""
    module: Any
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = vars(module)
            for name in ("forward", "_compiled_call_impl"):
                value = own.get(name)
                plain = None if name == "_compiled_call_impl" else uncompiled(value)
                if value is not None and plain is not value:
                    stack.callback(own.__setitem__, name, value)
                    own[name] = plain
        yield
