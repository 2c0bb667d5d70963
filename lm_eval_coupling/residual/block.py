"""One block of the measuring module tree, ready for use as long as a context lasts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.weights import state_of, upcast


class Block:
    """A block, its weights, and what a pass leaves behind in it."""

    def __init__(self, layer: int, module: nn.Module, causal: bool = True) -> None:
        self.layer, self.module, self.causal = layer, module, causal
        self.weights = state_of(module)
        self.names = _names(module)
        self.left_behind = LeftBehind(module.modules())

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return self.weights[0].device

    @contextlib.contextmanager
    def upcast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the block's weights, and only them, in ``dtype``; afterwards nothing of what was computed is left in it."""
        try:
            with upcast(self.weights, dtype):
                yield
        finally:
            self.left_behind.clear()

    @contextlib.contextmanager
    def ready(self, dtype: torch.dtype) -> Iterator[None]:
        """:meth:`upcast`, with everything computed inside in ``dtype`` too."""
        with self.upcast(dtype), arithmetic(dtype):
            yield

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
        """The stream among a call's arguments, those that have no name, and the others by their names."""
        if not args:
            kwargs = dict(kwargs)
            return kwargs.pop(self.stream_name), (), kwargs
        if len(args) > len(self.names):
            return args[0], args[1:], kwargs
        return args[0], (), dict(zip(self.names[1:], args[1:], strict=False)) | kwargs

    @property
    def stream_name(self) -> str:
        """The name of the argument that the stream is."""
        return self.names[0] if self.names else "hidden_states"


def _names(module: nn.Module) -> list[str]:
    """Those of the arguments taken by position, none where it takes any; a bridge has those of what it bridges."""
    module = getattr(module, "original_component", None) or module
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


class LeftBehind:
    """What passes put on modules beside their weights: attention patterns, pruned weights, tables with a graph.

    :meth:`clear` takes off every tensor that was not there before any pass, also after a pass that was broken off.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        plain = ((vars(m), {n: v for n, v in vars(m).items() if n not in _OWN}) for m in modules)
        self.before = [(now, len(now), before) for now, before in plain]

    def clear(self) -> None:
        """Put back what was there."""
        for now, size, before in self.before:
            if len(now) == size and all(now.get(name) is value for name, value in before.items()):
                continue
            changed = [
                n
                for n, v in now.items()
                if n not in _OWN and v is not before.get(n) and _holds_tensors(v)
            ]
            for name in changed:
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]


_OWN = {*vars(nn.Module())}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor)
