"""Contract between measures and :mod:`lm_eval_coupling.measuring`: inputs and results. No torch.

A measure takes a :class:`Batch` of traced prompts and returns a :class:`MeasureResult` for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lm_eval_coupling.errors import Reason

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from lm_eval_coupling.jacobians.engine import BlockJacobians
    from lm_eval_coupling.jacobians.protocol import Call, Model, Trace
    from lm_eval_coupling.numerics.spectra import SingularTriplets


@dataclasses.dataclass(frozen=True, eq=False)
class MeasureResult:
    """Result of one measure for one prompt.

    Attributes:
        columns: values by column name.
        reasons: reasons why columns are missing or undefined.
        seconds: time that the measure took.
    """

    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    seconds: float = 0.0

    @property
    def settled(self) -> bool:
        """True if a repetition would give the same result: only then is it worth keeping."""
        return bool(self.columns) and all(reason.settled for reason in self.reasons)

    def __eq__(self, other: object) -> bool:
        """Compare arrays by their entries; NaN equals NaN, and a list the tuple that it was."""
        if not isinstance(other, MeasureResult):
            return NotImplemented
        return (
            (self.reasons, self.seconds) == (other.reasons, other.seconds)
            and self.columns.keys() == other.columns.keys()
            and all(_are_equal(value, other.columns[name]) for name, value in self.columns.items())
        )

    __hash__ = None  # type: ignore[assignment] # columns are arrays


def _are_equal(value: Any, other: Any) -> bool:
    if isinstance(value, np.ndarray) or isinstance(other, np.ndarray):
        a, b = np.asarray(value), np.asarray(other)
        with_nan = a.dtype.kind in "fc" and b.dtype.kind in "fc"
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=with_nan)
    if isinstance(value, float) and isinstance(other, float) and math.isnan(value):
        return math.isnan(other)
    plain = [list(v) if isinstance(v, tuple) else v for v in (value, other)]
    return bool(plain[0] == plain[1])


@runtime_checkable
class Settings(Protocol):
    """Settings that measures read."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers K of top singular vectors, ascending."""

    @property
    def method(self) -> str:
        """Level at which Jacobians are computed, or ``auto``."""

    @property
    def window(self) -> int | None:
        """Blocks of the windowed numbers; None for the default."""

    @property
    def tokens(self) -> str:
        """Choice of tokens for self- and context coupling, such as ``last8``."""

    @property
    def layers(self) -> str:
        """Choice of blocks for self- and context coupling, such as ``spaced4``."""

    @property
    def trajectories(self) -> bool:
        """Keep the principal components of all tokens' trajectories."""


@runtime_checkable
class TracedPrompt(Protocol):
    """Prompt of a batch at its measured token."""

    @property
    def index(self) -> int:
        """Place of the prompt in its batch."""

    @property
    def model(self) -> Model:
        """Model that the prompt passed through."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids."""

    @property
    def position(self) -> int:
        """Measured token, from 0."""

    @property
    def last(self) -> int:
        """Last token that can move the measured one: in a causal model itself."""

    @property
    def settings(self) -> Settings:
        """Settings of the batch."""

    @property
    def trace(self) -> Trace:
        """Calls of all blocks in one forward pass, and the stream after the last block."""

    @property
    def trajectory(self) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x^0 … x^L at the measured token."""

    @property
    def blocks(self) -> BlockJacobians:
        """J_tt of every block with its certificate, trustworthy or not."""

    @property
    def proof(self) -> dict[str, Any]:
        """Columns that come with every Jacobian: certificate, method, slower_because."""

    @property
    def jacobians(self) -> Float[Tensor, "layer d_model d_model"]:
        """J_tt of every block; raises if one fails its certificate."""

    @property
    def triplets(self) -> SingularTriplets:
        """Top triplets of each block: one more than the largest rank where d_model allows it."""

    def attention_alone(self, call: Call) -> contextlib.AbstractContextManager[Call]:
        """Cut a block's call to its attention."""

    def mlp_alone(self, call: Call) -> contextlib.AbstractContextManager[Call]:
        """Cut a block's call to its MLP, as a function of the MLP's own input."""


@runtime_checkable
class Batch(Protocol):
    """Prompts that are measured together, at one token each."""

    @property
    def model(self) -> Model:
        """Model that the prompts passed through."""

    @property
    def settings(self) -> Settings:
        """Settings of all prompts."""

    @property
    def traces(self) -> Sequence[Trace]:
        """Traces of the prompts."""

    @property
    def trajectories(self) -> Sequence[Float[Tensor, "layer_plus_1 d_model"]]:
        """x^0 … x^L of each prompt at its measured token."""

    def __len__(self) -> int:
        """Return the number of prompts."""

    def __iter__(self) -> Iterator[TracedPrompt]:
        """Iterate over the prompts."""

    def measure_each(
        self, measure: Callable[[Any], MeasureResult], name: str
    ) -> list[MeasureResult]:
        """Apply ``measure`` to one prompt at a time."""

    def measure_together(
        self,
        measure: Callable[[Sequence[Any]], list[MeasureResult]],
        name: str,
        at_once: int,
    ) -> list[MeasureResult]:
        """Apply ``measure`` to up to ``at_once`` prompts at a time."""
