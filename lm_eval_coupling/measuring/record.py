"""Record of one prompt at one token, put together from the results of its measures. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.errors import CouplingError, Reason, flag, one_of, whole
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.headline import coupling_of
from lm_eval_coupling.measures.registry import measured_columns, record_columns


@dataclasses.dataclass(frozen=True, repr=False)
class PromptCoupling:
    """Record of one prompt at one token.

    Every column of docs/measures.md is an attribute and an item. Arrays are float32. A column that
    was not measured is None, or NaN for a single number. The first layer index is the Jacobian's,
    the second that of the singular vectors: A = U_{l'}ᵀ J_l V_{l'}.

    Attributes:
        tokens: token ids.
        position: measured token, from 0.
        ranks: numbers K of top singular vectors, ascending.
        results: result of each measure by name, with reasons for missing or undefined values.
    """

    tokens: tuple[int, ...]
    position: int
    ranks: tuple[int, ...]
    results: Mapping[str, MeasureResult] = dataclasses.field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that were asked for."""
        return tuple(self.results)

    @property
    def seconds(self) -> float:
        """Time taken; the time of a batch is divided by its prompts."""
        return math.fsum(result.seconds for result in self.results.values())

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Reasons for missing or undefined values, each once."""
        reasons = (reason for result in self.results.values() for reason in result.reasons)
        return tuple(dict.fromkeys(reasons))

    @property
    def reason(self) -> str | None:
        """:attr:`reasons` in words; None if nothing is missing."""
        return "; ".join(dict.fromkeys(reason.words for reason in self.reasons)) or None

    @property
    def reason_codes(self) -> tuple[str, ...]:
        """:attr:`reasons` as codes to count by, see :data:`~lm_eval_coupling.errors.CODES`."""
        return tuple(dict.fromkeys(reason.code for reason in self.reasons))

    def __repr__(self) -> str:
        """Return one line: the arrays would fill a screen."""
        values = "".join(f", coupling@{rank} {self.coupling(rank):.4f}" for rank in self.ranks)
        missing = "" if self.reason is None else f", {self.reason}"
        place = f"token {self.position} of {len(self.tokens)}"
        return f"<PromptCoupling at {place}{values}{missing}>"

    def __getattr__(self, name: str) -> Any:
        """Return the measured column ``name``."""
        column = None if name.startswith("_") else measured_columns().get(name)
        if column is None:
            raise AttributeError(f"{type(self).__name__} has no column {name!r}")
        for result in self.results.values():
            if result.columns.get(name) is not None:
                return result.columns[name]
        return column.missing

    def __getitem__(self, name: str) -> Any:
        """Return the attribute or column ``name``."""
        public = [attribute for attribute in dir(self) if not attribute.startswith("_")]
        return getattr(self, one_of("a column", name, public))

    def __dir__(self) -> list[str]:
        """List attributes and columns."""
        return sorted({*super().__dir__(), *measured_columns()})

    def coupling(self, rank: int, diagonal: bool = False) -> float:
        """Return 1 − mean of m̃_K over layer pairs l ≠ l'; NaN where it was not measured.

        Args:
            rank: one of the measured ranks.
            diagonal: include l = l'.

        Returns:
            At most 1, where the A of every pair is diagonal.

        Raises:
            CouplingError: if this rank was not measured.
        """
        diagonal = flag("diagonal", diagonal)
        if (rank := whole("rank", rank)) not in self.ranks:
            raise CouplingError(
                f"got rank {rank}, expected one of the measured ranks {list(self.ranks)}"
            )
        pairs = self.normalized_miscoupling
        return math.nan if pairs is None else coupling_of(pairs[self.ranks.index(rank)], diagonal)

    def to_columns(self) -> dict[str, Any]:
        """Return all columns by name, in the order of the tables."""
        return {name: getattr(self, name) for name in record_columns()}
