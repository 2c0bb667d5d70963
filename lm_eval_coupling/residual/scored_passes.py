"""Passes of the scored model, without derivatives, and the streams between its blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual import rotary
from lm_eval_coupling.residual.attachments import (
    has_own_classes,
    has_own_functions,
    uncompiled,
)
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.block_call import hidden
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.scored import evaluation_mode
from lm_eval_coupling.residual.stamp import Stamp
from lm_eval_coupling.residual.trace import ResidualTrace
from lm_eval_coupling.residual.weights import float_dtype


@dataclasses.dataclass
class ScoredPasses:
    """A model that is scored, run up to its last block.

    Attributes:
        name: its class.
        model: as it is scored, wrappers included.
        stamp: its state when it was wrapped.
        blocks: its blocks, by their names in the model inside the wrappers.
        inputs: what the model is run on.
        device: where the stream begins.
        rounds: whether its weights are in half precision.
        is_present: whether its weights are numbers on one device.
    """

    name: str
    model: nn.Module
    stamp: Stamp
    blocks: Sequence[nn.Module]
    inputs: Inputs
    device: torch.device
    rounds: bool
    is_present: bool

    @property
    def last_block(self) -> nn.Module:
        """Its last block."""
        return self.blocks[-1]

    @property
    def has_own_functions(self) -> bool:
        """True if hooks or other functions of the user take part in a pass."""
        return has_own_functions(self.stamp.attached)

    @property
    def has_own_code(self) -> bool:
        """True if functions of the user, or classes such as remote code, take part in a pass."""
        return self.has_own_functions or has_own_classes(self.stamp.attached)

    def final(self, prompts: Sequence[Any]) -> Tensor:
        """Return the stream [prompt, seq, d_model] after the last block, in float32."""
        return self.final_of(self.model, self.last_block, prompts)

    @torch.no_grad()
    def final_of(self, model: nn.Module, last: nn.Module, prompts: Sequence[Any]) -> Tensor:
        """Return the stream [prompt, seq, d_model] after the last block of any model, in float32.

        Functions of the user may go by the arguments: the model is given those of scoring then.
        """
        batch = self.inputs.batch(prompts, self.device, float_dtype(model))
        with run_plainly(model), streams_after(last) as streams:
            if self.has_own_functions:
                args, kwargs = self.inputs.as_scored(batch.arguments)
                model(*args, **kwargs)
            elif "logits_to_keep" in parameters_of(model):
                model(**batch.arguments, logits_to_keep=1)
            if not streams or (batch.lengths and streams[-1].shape[1] != batch.lengths[0]):
                # Gemma 4's last blocks run the tokens alone whose logits are kept.
                model(**batch.arguments)
        return streams[-1].float()

    def streams_through(self, prompt: Any, trace: ResidualTrace) -> list[tuple[Tensor, Tensor]]:
        """Return the streams [1, seq, d_model] before and after every block of the scored model."""
        starts: list[Tensor] = []

        def start(block: Block, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            starts.append(block.by_name(args, kwargs)[0].detach().clone())

        with contextlib.ExitStack() as stack:
            stack.enter_context(run_plainly(self.model))
            for block, call in zip(self.blocks, trace.calls, strict=True):
                # Before hooks of the user, which belong to the block.
                stack.enter_context(
                    block.register_forward_pre_hook(
                        functools.partial(start, call.block), prepend=True, with_kwargs=True
                    )
                )
            streams = [stack.enter_context(streams_after(block)) for block in self.blocks]
            batch = self.inputs.batch([prompt], self.device, float_dtype(self.model))
            args, kwargs = self.inputs.as_scored(batch.arguments)
            self.model(*args, **kwargs)
        return [(start, ends[-1]) for start, ends in zip(starts, streams, strict=True)]


@contextlib.contextmanager
def run_plainly(model: nn.Module) -> Iterator[None]:
    """Let a model run without compilation, tables of earlier prompts, and dropout."""
    with uncompiled_forwards(model), rotary.unused_tables(model), evaluation_mode(model):
        yield


@contextlib.contextmanager
def streams_after(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the streams after a block, one for each pass."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        streams.append(hidden(output).detach().clone())

    with block.register_forward_hook(keep):
        yield streams


@contextlib.contextmanager
def autocast_to_own(device: str, dtype: torch.dtype) -> Iterator[None]:
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


def parameters_of(model: nn.Module) -> Collection[str]:
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
