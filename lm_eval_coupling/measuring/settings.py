"""Settings of a measurement, validated. No torch."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from lm_eval_coupling.errors import CouplingError, flag, is_several, one_of, shown, whole
from lm_eval_coupling.jacobians.methods import BYTES, METHODS
from lm_eval_coupling.measures.formulas.choices import chosen_layers, chosen_tokens, written
from lm_eval_coupling.measures.registry import default_measures, registered_measures

# More tokens than any prompt and more blocks than any model, to check a choice without one.
LONG_PROMPT, DEEP_MODEL = 10**6, 10**4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that identify a measurement, together with weights, tokens and position."""

    ranks: tuple[int, ...] = (10, 30, 50)
    measures: tuple[str, ...] = dataclasses.field(default_factory=default_measures)
    dtype: str = "float32"
    method: str = "auto"
    window: int | None = None  # Blocks; None: eleven as in the paper, or all of a shallower model.
    tokens: str = "last8"  # Tokens of self- and context coupling.
    layers: str = "spaced4"  # Blocks of self- and context coupling.
    trajectories: bool = False

    def __post_init__(self) -> None:
        """Validate and normalize all fields."""

        def assign(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        assign("ranks", chosen_ranks(self.ranks))
        choices = registered_measures()
        if unknown := [name for name in self.measures if name not in choices]:
            raise CouplingError(
                f"got coupling_measures={_plus(self.measures)} with unknown measure "
                f"{unknown[0]!r}, expected any of {', '.join(choices)}"
            )
        if not self.measures:
            raise CouplingError(f"got no coupling_measures, expected any of {', '.join(choices)}")
        assign("measures", tuple(name for name in choices if name in self.measures))
        assign("dtype", str(self.dtype).removeprefix("torch."))
        one_of("coupling_dtype", self.dtype, tuple(BYTES))
        one_of("coupling_method", self.method, METHODS)
        if self.window is not None:
            assign("window", whole("coupling_window", self.window, 1))
        assign("trajectories", flag("coupling_trajectories", self.trajectories))
        for name in ("tokens", "layers"):
            assign(name, written(f"coupling_{name}", getattr(self, name)))
        if self.tokens != "all":
            chosen_tokens(self.tokens, LONG_PROMPT)
        if self.layers != "all":
            chosen_layers(self.layers, DEEP_MODEL)

    def check_shape(self, d_model: int, n_layers: int | None = None) -> None:
        """Check ranks, blocks and window against the shape of a model.

        Raises:
            CouplingError: if the model is too narrow for the ranks, or lacks the blocks.
        """
        if self.ranks[-1] > d_model:
            raise CouplingError(
                f"got coupling_ranks={_plus(self.ranks)}, rank {self.ranks[-1]} for a model with "
                f"d_model = {d_model}; choose ranks of at most {d_model}"
            )
        if n_layers is None:
            return
        chosen_layers(self.layers, n_layers)
        if self.window is not None and self.window > n_layers:
            raise CouplingError(
                f"got a window of {self.window} blocks for a model of {n_layers}, "
                "give a coupling_window of at most that"
            )

    def for_measure(self, name: str) -> dict[str, Any]:
        """Return the settings and the version that one measure's values depend on.

        They are JSON-able and part of the key of stored results.
        """
        measure = registered_measures()[name]
        return {field: _json(getattr(self, field)) for field in ("dtype", *measure.settings)} | {
            "version": measure.version
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that the asked measures depend on, and the measures' versions."""
        measures = {name: registered_measures()[name] for name in self.measures}
        names = {"measures", "dtype", "ranks", "method"}
        names.update(field for measure in measures.values() for field in measure.settings)
        plain = {
            field.name: _json(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name in names and getattr(self, field.name) not in (None, False)
        }
        versions = {f"{name}_version": measure.version for name, measure in measures.items()}
        return plain | versions

    def extra(self, n_layers: int, d_model: int, position: int) -> tuple[int, float]:
        """Return the Jacobians taken besides J_tt, and the MB of them held at a time."""
        counters = [registered_measures()[name].extra for name in self.measures]
        counts = [counter(n_layers, position, self) for counter in counters if counter is not None]
        held = max((held for _, held in counts), default=0)
        return sum(number for number, _ in counts), held * d_model**2 * BYTES[self.dtype] / 1e6


def chosen_measures(given: Any) -> tuple[str, ...]:
    """Return names of measures, given as one, several, or ``depth+swapped``.

    Raises:
        CouplingError: if a name is not a text.
    """
    if isinstance(given, str):
        names = given.split("+")
    else:
        names = list(given) if is_several(given) else [given]
    if not all(isinstance(name, str) for name in names):
        expected = ", ".join(registered_measures())
        raise CouplingError(f"got coupling_measures={shown(given)}, expected any of {expected}")
    return tuple(names)


def chosen_ranks(given: Any) -> tuple[int, ...]:
    """Return ranks in ascending order, given as one number, several, or ``10+30``.

    Raises:
        CouplingError: if a rank is not a positive whole number.
    """
    try:
        if isinstance(given, str):
            parts = given.split("+")
        else:
            is_number = isinstance(given, int) or getattr(given, "ndim", None) == 0
            parts = [given] if is_number else list(given)
        has_bool = any(isinstance(part, bool) for part in parts)
        ranks = {int(part) if isinstance(part, str) else operator.index(part) for part in parts}
    except (TypeError, ValueError):
        has_bool, ranks = False, set()
    if has_bool or not ranks or min(ranks) < 1:
        text = _plus(tuple(given)) if isinstance(given, list | tuple) else given
        raise CouplingError(
            f"got coupling_ranks={text}, expected positive whole numbers such as 10+30+50"
        )
    return tuple(sorted(ranks))


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plus(values: tuple[Any, ...]) -> str:
    return "+".join(map(str, values))
