"""What a block does with one token, step by step, and the derivative of the outcome.

The block runs first; then those steps alone that the outcome depends on are differentiated, in order. Blocks do more than
they need: TransformerLens' norms compute their scale a second time for its hook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor

from lm_eval_coupling.jacobians.attention_core import Watch
from lm_eval_coupling.jacobians.rules import COMPOSITES, RULES, NoRule
from lm_eval_coupling.jacobians.tangent import Tangent


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on what depends on a variable. ``versions`` tell whether an input has been changed in place since."""

    function: Callable
    rule: Callable[..., Any]
    inputs: list[Tensor]
    args: tuple
    kwargs: dict[str, Any]
    value: Any
    versions: list[int]


class Tape(Watch):
    """Keeps what is done with the watched tensors while a block runs inside, and differentiates it afterwards.

    ``core`` answers for the attention core: it gets (tape, q, kᵀ, v) and returns the core's output.
    """

    def __init__(self, core: Callable[[Tape, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.core = core
        self.steps: list[Step] = []
        self.watched: dict[int, Tensor] = {}  # holds the tensors, so that no id is used twice
        self.tangents: dict[int, Tangent] = {}

    def watch(self, value: Tensor, tangent: Tangent | None = None) -> Tensor:
        """Follow ``value`` from here on; returns it. A variable has its tangent given."""
        self.watched[id(value)] = value
        if tangent is not None:
            self.tangents[id(value)] = tangent
        return value

    def note(
        self,
        function: Callable,
        rule: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        value: Any,
    ) -> Any:
        """Put a step on the tape; returns its value."""
        for part in (produced := [part for part in _tensors((value,)) if part.is_floating_point()]):
            self.watch(part)
        if produced:
            inputs = [x for x in _tensors((*args, *kwargs.values())) if id(x) in self.watched]
            step = Step(
                function=function,
                rule=rule,
                inputs=inputs,
                args=args,
                kwargs=kwargs,
                value=value,
                versions=[x._version for x in inputs],
            )
            self.steps.append(step)
        return value

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        return self.core(self, *self.factors, values)

    def _on_other(self, func: Callable, args: Any, kwargs: Any) -> Any:
        if not any(id(value) in self.watched for value in _tensors((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                same = COMPOSITES[func](*args, **kwargs)
            return self.note(func, _same, (same,), {}, func(*args, **kwargs))
        return self.note(func, RULES.get(func, _missing), args, kwargs, func(*args, **kwargs))

    def of(self, value: Any) -> Tangent | None:
        """Tangent of ``value``; None for whatever does not depend on a variable."""
        return self.tangents.get(id(value))

    def differentiate(self, outcome: Tensor) -> Tangent:
        """Tangent of ``outcome``.

        Returns:
            How it changes with the variables, in whatever form their tangents were given.

        Raises:
            NoRule: if a step on the way has no rule, or the outcome depends on no variable.
        """
        steps = self._on_the_way_to(outcome)
        last = {id(x): i for i, step in enumerate(steps) for x in step.inputs}
        for i, step in enumerate(steps):
            if any(x._version != was for x, was in zip(step.inputs, step.versions, strict=True)):
                raise NoRule("a tensor was changed in place after it had been used")
            if any(self.of(x) is not None for x in step.inputs):
                self._keep(
                    step.value,
                    step.rule(self, step.function, step.value, *step.args, **step.kwargs),
                )
            for (
                x
            ) in step.inputs:  # most are as large as a weight matrix, for every prompt of a batch
                if last[id(x)] == i:
                    self.tangents.pop(id(x), None)
        if (tangent := self.of(outcome)) is None:
            raise NoRule(
                "the outcome does not depend on the token, or lost its derivative on the way"
            )
        return tangent

    def _on_the_way_to(self, outcome: Tensor) -> list[Step]:
        wanted, found = {id(outcome)}, []
        for step in reversed(self.steps):
            if any(id(part) in wanted for part in _tensors((step.value,))):
                wanted |= {id(x) for x in step.inputs}
                found.append(step)
        return found[::-1]

    def _keep(self, value: Any, tangent: Any) -> None:
        if not isinstance(value, Tensor):
            for part, part_tangent in zip(value, tangent, strict=True):
                self._keep(part, part_tangent)
        elif tangent is not None:
            self.watch(value, tangent)


def _same(run: Tape, func: Callable, value: Tensor, same: Tensor) -> Tangent | None:
    return run.of(same)


def _missing(run: Tape, func: Callable, value: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise NoRule(f"no rule for {getattr(func, '__qualname__', func)}")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found
