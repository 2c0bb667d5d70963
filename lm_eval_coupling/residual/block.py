"""One block of the measuring module tree, ready for use inside a context."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual.arguments import tensors_in
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.bridge import innermost, is_component
from lm_eval_coupling.residual.object_digest import MODULE_ATTRIBUTES
from lm_eval_coupling.residual.weights import state_of, upcast


class Block:
    """A block, its weights, and its state before any pass."""

    def __init__(self, layer: int, module: nn.Module, causal: bool = True) -> None:
        self.layer, self.module, self.causal = layer, module, causal
        self.weights = state_of(module)
        self.names = _positional_names(module)
        self.before = PassState(module.modules())
        self.is_verified = False  # set once outputs have been compared with derivatives
        self.verifies_each = False  # True if functions of the user may act on some prompts alone

    @property
    def device(self) -> torch.device:
        """Device of the block's first weight."""
        return self.weights[0].device

    @property
    def stream_name(self) -> str:
        """Name of the argument that the stream is."""
        return self.names[0] if self.names else "hidden_states"

    @contextlib.contextmanager
    def upcast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the block's weights in ``dtype``, then put back all that a pass has changed."""
        try:
            with upcast(self.weights, dtype):
                yield
        finally:
            self.before.restore()

    @contextlib.contextmanager
    def ready(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the weights and all arithmetic in ``dtype``."""
        with self.upcast(dtype), arithmetic(dtype):
            yield

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
        """Split a call's arguments into the stream, unnamed arguments and named ones."""
        if not args:
            kwargs = dict(kwargs)
            return kwargs.pop(self.stream_name), (), kwargs
        if len(args) > len(self.names):
            return args[0], args[1:], kwargs
        return args[0], (), dict(zip(self.names[1:], args[1:], strict=False)) | kwargs

    def as_called(
        self, stream: Tensor, unnamed: tuple, named: dict[str, Any], positional: int
    ) -> tuple[tuple, dict[str, Any]]:
        """Undo :meth:`by_name`, as hooks see which arguments come by position.

        Returns:
            The first ``positional`` arguments of the call, and the others by name.
        """
        if not positional:
            return (), {self.stream_name: stream} | named
        by_position = () if unnamed else self.names[1:positional]
        rest = {name: value for name, value in named.items() if name not in by_position}
        return (stream, *unnamed, *(named[name] for name in by_position)), rest


def _positional_names(module: nn.Module) -> list[str]:
    """Return positional parameter names; empty if the block takes ``*args``."""
    # TransformerLens' component takes any arguments.
    parameters = inspect.signature(innermost(module).forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


class PassState:
    """Attributes and buffers of modules before any pass, which may leave others behind.

    Passes leave attention patterns, tables with a graph, longer rotary tables and their lengths.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [_ModuleState(module) for module in modules]

    def restore(self) -> bool:
        """Put everything back, also after a pass that was broken off.

        Returns:
            True if a pass has changed something that was there before.
        """
        return any([state.restore() for state in self.modules])


class _ModuleState:
    def __init__(self, module: nn.Module) -> None:
        self.attributes, self.buffers = vars(module), module._buffers
        own = {n: v for n, v in self.attributes.items() if n not in _NOT_RESTORED}
        self.kept = {name: (value, _contents(value)) for name, value in own.items()}
        self.names, self.values = [*own], [*own.values()]
        self.containers = [item for item in self.kept.values() if item[1] is not None]
        self.is_component = is_component(module)
        self.size = len(self.attributes)
        self.kept_buffers = dict(self.buffers)
        # Buffers of the twin's own that some models write to in every pass.
        self.numbers = {
            name: (buffer, buffer.clone(), buffer._version)
            for name, buffer in self.buffers.items()
            if name in module._non_persistent_buffers_set
            and isinstance(buffer, Tensor)
            and buffer.is_floating_point()
            and not buffer.is_inference()
        }

    def restore(self) -> bool:
        changed = self._restore_buffers()
        if self._is_as_before():
            return changed
        if self.is_component:
            self._drop_tensors()
            return changed
        for name in [n for n in self.attributes if n not in _NOT_RESTORED]:
            if name not in self.kept:
                del self.attributes[name]
        for name, (value, contents) in self.kept.items():
            if self.attributes.get(name, _MISSING) is not value:
                self.attributes[name] = value
                changed = True
            if not _has_contents(value, contents):
                _put_back(value, contents)
                changed = True
        return changed

    def _is_as_before(self) -> bool:
        # By `map`: this runs for every module after every pass of a block.
        present = map(self.attributes.get, self.names, itertools.repeat(_MISSING))
        return (
            len(self.attributes) == self.size
            and all(map(operator.is_, present, self.values))
            and all(_has_contents(value, contents) for value, contents in self.containers)
        )

    def _drop_tensors(self) -> None:
        """Put back only what holds tensors: a component's other notes are for its next pass."""
        for name in [n for n in self.attributes if n not in _NOT_RESTORED]:
            value, _ = self.kept.get(name, (None, None))
            if self.attributes[name] is not value and tensors_in(self.attributes[name]):
                self.attributes[name] = value
                if name not in self.kept:
                    del self.attributes[name]

    def _restore_buffers(self) -> bool:
        changed = len(self.buffers) != len(self.kept_buffers) or any(
            self.buffers.get(name, _MISSING) is not buffer
            for name, buffer in self.kept_buffers.items()
        )
        if changed:
            self.buffers.clear()
            self.buffers.update(self.kept_buffers)
        for name, (buffer, numbers, version) in self.numbers.items():
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(numbers)
                self.numbers[name] = (buffer, numbers, buffer._version)
                changed = True
        return changed


_MISSING = object()
_NOT_RESTORED = MODULE_ATTRIBUTES | {"forward"}


def _contents(value: Any) -> Any:
    """Return a shallow copy of a list or dictionary, None for anything else."""
    return type(value)(value) if type(value) in (list, dict) else None


def _has_contents(value: Any, contents: Any) -> bool:
    if contents is None:
        return True
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return all(value.get(key, _MISSING) is item for key, item in contents.items())
    return all(a is b for a, b in zip(value, contents, strict=True))


def _put_back(value: Any, contents: Any) -> None:
    value.clear()
    value.update(contents) if isinstance(value, dict) else value.extend(contents)
