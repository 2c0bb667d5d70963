"""What was measured of one prompt at one token: one record, put together from what each measure found. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.errors import CouplingError, Reason, flag, one_of, whole
from lm_eval_coupling.measures.formulas.headline import coupling_of
from lm_eval_coupling.measures.registry import MeasureResult, measured_columns, record_columns


@dataclasses.dataclass(frozen=True)
class PromptCoupling:
    """Everything measured of one prompt at one token.

    Every column of docs/measures.md is an attribute, and an item for who has its name: arrays are float32; what was not
    measured is ``None``, or NaN where a single number would stand. First layer index = the Jacobian's, second = that of the
    singular vectors: A = U_{l'}ᵀ J^l V_{l'}.

    Attributes:
        tokens: token ids.
        position: the measured token, from 0.
        ranks: numbers K of top singular vectors, ascending.
        results: what each measure found, by its name, with the reasons for what is missing or undefined.
    """

    tokens: tuple[int, ...]
    position: int
    ranks: tuple[int, ...]
    results: Mapping[str, MeasureResult] = dataclasses.field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """What was asked for."""
        return tuple(self.results)

    @property
    def seconds(self) -> float:
        """What it took, a batch's time divided by its prompts."""
        return math.fsum(found.seconds for found in self.results.values())

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why something is missing or undefined, each once."""
        return tuple(
            dict.fromkeys(reason for found in self.results.values() for reason in found.reasons)
        )

    @property
    def reason(self) -> str | None:
        """:attr:`reasons` in words; ``None`` if nothing is missing."""
        return "; ".join(dict.fromkeys(reason.words for reason in self.reasons)) or None

    @property
    def reason_codes(self) -> tuple[str, ...]:
        """:attr:`reasons` to count by, see :data:`~lm_eval_coupling.errors.CODES`."""
        return tuple(dict.fromkeys(reason.code for reason in self.reasons))

    def __getattr__(self, name: str) -> Any:
        column = None if name.startswith("_") else measured_columns().get(name)
        if column is None:
            raise AttributeError(f"{type(self).__name__} has no column {name!r}")
        for found in self.results.values():
            if found.columns.get(name) is not None:
                return found.columns[name]
        return column.missing

    def __getitem__(self, name: str) -> Any:
        return getattr(self, one_of("a column", name, [one for one in dir(self) if one[0] != "_"]))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *measured_columns()})

    def coupling(self, rank: int, diagonal: bool = False) -> float:
        """1 − mean of m̃_K over layer pairs l ≠ l' (with ``diagonal``, over all pairs); NaN where not measured.

        Returns:
            At most 1: every pair's A is diagonal.

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
        """Flat dict in the order of the tables."""
        return {name: getattr(self, name) for name in record_columns()}
