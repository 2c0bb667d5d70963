"""What is measured of a prompt, checked. No torch."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from lm_eval_coupling.errors import CouplingError, flag, is_several, one_of, shown, whole
from lm_eval_coupling.jacobians.methods import BYTES, METHODS
from lm_eval_coupling.measures.formulas.choices import chosen_layers, chosen_tokens, written
from lm_eval_coupling.measures.registry import default_measures, registered_measures


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured of a prompt; together with weights, tokens and position it identifies a measurement."""

    ranks: tuple[int, ...] = (10, 30, 50)
    measures: tuple[str, ...] = dataclasses.field(default_factory=default_measures)
    dtype: str = "float32"
    method: str = "auto"
    window: int | None = None  # blocks; None: eleven as in the paper, or all of a shallower model
    tokens: str = "last8"  # of self- and context coupling
    layers: str = "spaced4"
    trajectories: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", chosen_ranks(self.ranks))
        known = registered_measures()
        if unknown := [name for name in self.measures if name not in known]:
            raise CouplingError(
                f"got coupling_measures={_plus(self.measures)} with unknown measure {unknown[0]!r}, "
                f"expected any of {', '.join(known)}"
            )
        if not self.measures:
            raise CouplingError(f"got no coupling_measures, expected any of {', '.join(known)}")
        object.__setattr__(self, "measures", tuple(name for name in known if name in self.measures))
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))  # torch's own too
        one_of("coupling_dtype", self.dtype, tuple(BYTES))
        one_of("coupling_method", self.method, METHODS)
        if self.window is not None:
            object.__setattr__(self, "window", whole("coupling_window", self.window, 1))
        object.__setattr__(self, "trajectories", flag("coupling_trajectories", self.trajectories))
        for name in ("tokens", "layers"):
            object.__setattr__(self, name, written(f"coupling_{name}", getattr(self, name)))
        if self.tokens != "all":
            chosen_tokens(
                self.tokens, 10**6
            )  # is it a choice of tokens at all? How long prompts are is seen later

    def check_shape(self, d_model: int, n_layers: int | None = None) -> None:
        """Refuse ranks that the model is too narrow for, and a window or blocks that it is too shallow for."""
        if self.ranks[-1] > d_model:
            raise CouplingError(
                f"got coupling_ranks={_plus(self.ranks)}, rank {self.ranks[-1]} for a model with d_model = {d_model}; "
                f"choose ranks of at most {d_model}"
            )
        if n_layers is not None:
            chosen_layers(self.layers, n_layers)
        if self.window is not None and n_layers is not None and self.window > n_layers:
            raise CouplingError(
                f"got a window of {self.window} blocks for a model of {n_layers}, give a coupling_window of at most that"
            )

    def for_measure(self, measure: str) -> dict[str, Any]:
        """What the numbers of one measure depend on, JSON-able, its version included: part of their key."""
        about = registered_measures()[measure]
        plain = {name: getattr(self, name) for name in ("dtype", *about.settings)}
        return {name: _plain(value) for name, value in plain.items()} | {"version": about.version}

    def as_dict(self) -> dict[str, Any]:
        """Every setting that touches what is measured, JSON-able, with the version of each measure."""
        names = {
            name
            for measure in self.measures
            for name in ("dtype", "ranks", "method", *registered_measures()[measure].settings)
        }
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name in names or f.name == "measures"
        }
        versions = {
            f"{name}_version": registered_measures()[name].version for name in self.measures
        }
        return {
            name: _plain(value) for name, value in plain.items() if value not in (None, False)
        } | versions

    def extra(self, n_layers: int, d_model: int, position: int) -> tuple[int, float]:
        """Jacobians that a prompt takes beside those of the depth, and MB of them held at a time."""
        found = [registered_measures()[name].extra for name in self.measures]
        counts = [extra(n_layers, position, self) for extra in found if extra is not None]
        held = max((held for _, held in counts), default=0)
        return sum(number for number, _ in counts), held * d_model**2 * BYTES[self.dtype] / 1e6


def chosen_measures(given: Any) -> tuple[str, ...]:
    """Return names of measures, of one, several, or as on the command line, ``depth+swapped``.

    Raises:
        CouplingError: for what is no text.
    """
    several = (
        given.split("+")
        if isinstance(given, str)
        else list(given)
        if is_several(given)
        else [given]
    )
    if not all(isinstance(name, str) for name in several):
        raise CouplingError(
            f"got coupling_measures={shown(given)}, expected any of {', '.join(registered_measures())}"
        )
    return tuple(several)


def chosen_ranks(given: Any) -> tuple[int, ...]:
    """Ranks in ascending order, of one number, of several in any kind of sequence, or as on the command line, ``10+30``."""
    try:
        alone = isinstance(given, int) or getattr(given, "ndim", None) == 0
        several = given.split("+") if isinstance(given, str) else [given] if alone else list(given)
        if any(isinstance(k, bool) for k in several):
            raise TypeError
        found = tuple(
            sorted({int(k) if isinstance(k, str) else operator.index(k) for k in several})
        )
    except (TypeError, ValueError):
        found = ()
    if not found or found[0] < 1:
        told = _plus(tuple(given)) if isinstance(given, list | tuple) else given
        raise CouplingError(
            f"got coupling_ranks={told}, expected positive whole numbers such as 10+30+50"
        )
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plus(values: tuple[Any, ...]) -> str:
    return "+".join(map(str, values))
