"""The scored model's own passes, with which traces of measured prompts are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.residual import rotary
from lm_eval_coupling.residual.attachments import has_own_functions, uncompiled
from lm_eval_coupling.residual.block_call import hidden
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.load_checks import (
    OTHER_KERNELS,
    PACKED,
    SAME_KERNELS,
    off_by,
)
from lm_eval_coupling.residual.stamp import Stamp

_CLOSE = 2e-2  # in half precision: nearer than this, two arithmetics need no second opinion


@dataclasses.dataclass
class ScoredModel:
    """The model that is scored, run on measured prompts up to its last block.

    Attributes:
        model: as it is scored, wrappers included.
        last_block: its last block, by the block's name in the model inside the wrappers.
        inputs: what the model is run on.
        device: where the stream begins.
        twin: makes a module tree that runs by the kernels that score.
        rounds: whether its weights are in half precision.
        is_present: whether its weights are numbers on one device.
    """

    name: str
    model: nn.Module
    last_block: nn.Module
    last_name: str
    inputs: Inputs
    device: torch.device
    twin: Callable[[], nn.Module]
    rounds: bool
    is_present: bool

    def require_agreement(
        self, prompt: Any, tokens: Sequence[int], resid_final: Float[Tensor, "1 seq d_model"]
    ) -> None:
        """Refuse a prompt whose traced stream is not the one that the scored model computes.

        Costs one pass without derivatives. In half precision, where float32 arithmetic is further
        away than rounding, a second pass decides by the kernels that score.

        Raises:
            Unmeasurable: if the stream after the last block differs at a measured token.
        """
        if self.model.training:  # dropout
            return
        seq = resid_final.shape[1]
        scored = self._final(self.model, self.last_block, prompt, seq)[0]
        error = _most_off(resid_final[0], scored, tokens)
        tolerance = OTHER_KERNELS if self.is_present else PACKED
        if self.is_present and self.rounds and error > _CLOSE:
            twin = self.twin()
            last = twin.get_submodule(self.last_name)
            error = _most_off(self._final(twin, last, prompt, seq)[0], scored, tokens)
            tolerance = SAME_KERNELS
        elif self.rounds:
            tolerance = max(tolerance, _CLOSE)
        if not error <= tolerance:
            raise Unmeasurable(
                "refused",
                f"the stream after the last block is off by {error:.1e} from what {self.name} "
                "computes when it scores this prompt, expected the same: a part of the model acts "
                "on this prompt in a way that its blocks alone do not",
            )

    @torch.no_grad()
    def _final(self, model: nn.Module, last: nn.Module, prompt: Any, seq: int) -> Tensor:
        """Return the stream [1, seq, d_model] after a model's last block, in float32."""
        dtype = next(
            (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1),
            torch.float32,
        )
        streams: list[Tensor] = []
        handle = last.register_forward_hook(
            lambda module, args, output: streams.append(hidden(output).detach().clone())
        )
        arguments = self.inputs.batch([prompt], self.device, dtype).arguments
        try:
            with uncompiled_forwards(model), rotary.unused_tables(model):
                if _takes_logits_to_keep(model):
                    model(**arguments, logits_to_keep=1)
                if not streams or streams[-1].shape[1] != seq:
                    # Gemma 4's last blocks run the tokens alone whose logits are kept.
                    model(**arguments)
        finally:
            handle.remove()
        return streams[-1].float()


def _most_off(
    stream: Float[Tensor, "seq d_model"],
    scored: Float[Tensor, "seq d_model"],
    tokens: Sequence[int],
) -> float:
    """Return the largest relative difference at one of the tokens; NaN if one is NaN."""
    errors = [off_by(stream[token], scored[token]) for token in tokens]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclasses.dataclass(frozen=True)
class Scored:
    """The model that a :class:`.model.ResidualModel` was made of, as it was then.

    Attributes:
        model: the model, wrappers included.
        stamp: its state when it was wrapped.
        probed: the stream after the last block for the probe.
        passes: runs it on measured prompts.
    """

    model: nn.Module
    stamp: Stamp
    probed: Float[Tensor, "1 seq d_model"]
    passes: ScoredModel

    @property
    def has_own_functions(self) -> bool:
        """True if hooks or other functions of the user take part in a pass."""
        return has_own_functions(self.stamp.attached)


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


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
