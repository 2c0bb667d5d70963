"""A record of what a block does with one token, and the derivative of its outcome.

The block runs first. Only steps that the outcome depends on are differentiated then, in order:
blocks do more than they need, such as TransformerLens' norms, which compute their scale a second
time for its hook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor

from lm_eval_coupling.jacobians.rules import COMPOSITES, RULES, NoRule
from lm_eval_coupling.jacobians.tangent import Tangent
from lm_eval_coupling.jacobians.watch import Watch


@dataclasses.dataclass(frozen=True)
class Step:
    """Operation on tensors that depend on a variable.

    ``versions`` are those of the inputs: a later one shows that an input was changed in place.
    """

    function: Callable
    rule: Callable[..., Any]
    inputs: list[Tensor]
    args: tuple
    kwargs: dict[str, Any]
    value: Any
    versions: list[int]


class Tape(Watch):
    """Mode that records the operations on watched tensors, and differentiates them afterwards.

    ``core`` stands for the attention core: it gets (tape, q, kᵀ, v) and returns the core's output.
    """

    def __init__(self, core: Callable[[Tape, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.core = core
        self.steps: list[Step] = []
        self.watched: dict[int, Tensor] = {}  # holds the tensors, so that no id is used twice
        self.tangents: dict[int, Tangent] = {}

    def watch(self, value: Tensor, tangent: Tangent | None = None) -> Tensor:
        """Follow ``value`` from now on and return it; a variable comes with its tangent."""
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
        """Record a step and return its value."""
        produced = [part for part in _tensors((value,)) if part.is_floating_point()]
        for part in produced:
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
                in_steps = COMPOSITES[func](*args, **kwargs)
            return self.note(func, _tangent_of, (in_steps,), {}, func(*args, **kwargs))
        return self.note(func, RULES.get(func, _no_rule), args, kwargs, func(*args, **kwargs))

    def of(self, value: Any) -> Tangent | None:
        """Return the tangent of ``value``; None if it depends on no variable."""
        return self.tangents.get(id(value))

    def differentiate(self, outcome: Tensor) -> Tangent:
        """Return the tangent of ``outcome`` with respect to the watched variables.

        Raises:
            NoRule: if a step on the way has no rule, or the outcome depends on no variable.
        """
        steps = self._steps_to(outcome)
        last_use = {id(x): i for i, step in enumerate(steps) for x in step.inputs}
        for i, step in enumerate(steps):
            if any(x._version != was for x, was in zip(step.inputs, step.versions, strict=True)):
                raise NoRule("a tensor was changed in place after it had been used")
            if any(self.of(x) is not None for x in step.inputs):
                tangent = step.rule(self, step.function, step.value, *step.args, **step.kwargs)
                self._keep(step.value, tangent)
            # Most tangents are as large as a weight matrix, for every prompt of a batch.
            for x in step.inputs:
                if last_use[id(x)] == i:
                    self.tangents.pop(id(x), None)
        if (tangent := self.of(outcome)) is None:
            raise NoRule(
                "the outcome does not depend on the token, or lost its derivative on the way"
            )
        return tangent

    def _steps_to(self, outcome: Tensor) -> list[Step]:
        needed, steps = {id(outcome)}, []
        for step in reversed(self.steps):
            if any(id(part) in needed for part in _tensors((step.value,))):
                needed |= {id(x) for x in step.inputs}
                steps.append(step)
        return steps[::-1]

    def _keep(self, value: Any, tangent: Any) -> None:
        if not isinstance(value, Tensor):
            for part, part_tangent in zip(value, tangent, strict=True):
                self._keep(part, part_tangent)
        elif tangent is not None:
            self.watch(value, tangent)


def _tangent_of(tape: Tape, func: Callable, value: Tensor, in_steps: Tensor) -> Tangent | None:
    return tape.of(in_steps)


def _no_rule(tape: Tape, func: Callable, value: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise NoRule(f"no rule for {getattr(func, '__qualname__', func)}")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            tensors += [item for item in value if isinstance(item, Tensor)]
    return tensors
