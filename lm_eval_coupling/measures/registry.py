"""What is known of every measure, in one form. Record, store, tables, summaries, fits and docs are derived from it.

A measure is one file of this package that ends in ``MEASURES = (Measure(…),)``: its columns with their shapes and meaning,
the function that fills them, and the readings that are drawn and fitted. It imports torch only inside the functions that
compute, so that whoever reads results can know the columns without it. NumPy only.

Shapes are written as jaxtyping writes them, over the sizes ``rank`` (of the K asked for), ``max_rank``, ``layer``, ``seq``
(tokens of the prompt), ``token`` and ``chosen`` (those a measure over tokens compares), ``window`` and ``component``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from lm_eval_coupling import measures as _package
from lm_eval_coupling.errors import CouplingError, Reason

if TYPE_CHECKING:
    from lm_eval_coupling.measuring.batch import Batch
    from lm_eval_coupling.measuring.settings import Settings


@runtime_checkable
class Record(Protocol):
    """Whatever gives a column by its name: a measured prompt, or a row of a table as a dict."""

    def __getitem__(self, name: str, /) -> Any:
        """The column ``name``."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a record.

    Attributes:
        name: in the record and in the tables.
        shape: names of its dimensions, "" for a single value.
        doc: what it is: definition, unit, source.
        kind: of its values. Numbers are float32 in arrays and float64 alone; doubles are float64 in arrays too.
        option: argument of a run that records it, where asking for its measure is not enough.
    """

    name: str
    shape: str = ""
    doc: str = ""
    kind: Literal["number", "double", "whole", "text", "bytes"] = "number"
    option: str = ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Of an array; none for a single value."""
        return tuple(self.shape.split())

    @property
    def missing(self) -> float | None:
        """What stands where nothing was measured."""
        return math.nan if self.kind == "number" and not self.shape else None

    def cast(self, value: Any) -> Any:
        """``value`` as a record holds it: a float32 array, a tuple or a single Python value.

        Returns:
            None stays None.

        Raises:
            CouplingError: if it has another number of dimensions.
        """
        if value is None:
            return None
        if self.kind != "number":
            return tuple(np.asarray(value).tolist()) if self.shape else np.asarray(value).item()
        if not self.shape:
            return float(value)
        array = np.asarray(value, dtype=np.float32)
        if array.ndim != len(self.dimensions):
            raise CouplingError(
                f"got {self.name} of shape {array.shape}, expected the dimensions [{self.shape}]"
            )
        return array


@dataclasses.dataclass(frozen=True)
class Reading:
    """One number of a prompt, or one for every place in depth, as it is drawn and fitted.

    Attributes:
        name: in tables of studies and as predictor.
        label: in pictures.
        column: the column it is read from; without it there is no reading.
        read: takes a record (anything that gives a column by its name) and a rank K.
        over: what it has a value for: the ``prompt``, each ``block``, each ``point`` of the stream (x^0 first), or each
            ``window`` of blocks.
        of_rank: whether it depends on K.
        sign: 1 or −1, whether it is expected to go with or against the score; 0 where nobody has said.
        chance: its value where layers have nothing to do with each other, by K.
        log: drawn on a logarithmic axis.
    """

    name: str
    label: str
    column: str
    read: Callable[[Record, int], Any]
    over: Literal["prompt", "block", "point", "window"] = "prompt"
    of_rank: bool = False
    sign: int = 0
    chance: Callable[[int], float] | None = None
    log: bool = False

    def chance_at(self, rank: int) -> float:
        """Its value at chance; NaN where there is no such thing."""
        return math.nan if self.chance is None else self.chance(rank)

    def in_depth(self, record: Record, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Depths and the values that stand there, in float64.

        Returns:
            Depth 0 is the input of the first block, l the output of block l or the block itself, a window stands at its
            centre, and the whole prompt has the depth NaN.
        """
        values = np.atleast_1d(np.asarray(self.read(record, rank), dtype=np.float64))
        places = np.arange(float(len(values)))
        if self.over == "prompt":
            return np.full(len(values), math.nan), values
        return places + {"point": 0, "block": 1, "window": int(record["window"] or 0) / 2}[
            self.over
        ], values


def column_reading(name: str, label: str, column: str | None = None, **more: Any) -> Reading:
    """A reading that is a column as it stands, by default the one of its name."""
    column = column or name
    return Reading(name, label, column, lambda record, rank: record[column], **more)


@dataclasses.dataclass(frozen=True)
class MeasureResult:
    """What a measure found for one prompt: its columns, why some are missing or undefined, and how long it took."""

    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    seconds: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether measuring again would find the same: only then is it worth keeping."""
        return bool(self.columns) and all(reason.settled for reason in self.reasons)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What can be asked for with ``coupling_measures``.

    Attributes:
        name: as it is asked for.
        doc: what it says, in a sentence or two.
        columns: what it records.
        run: takes a :class:`~lm_eval_coupling.measuring.batch.Batch` and returns what it found for each prompt.
        version: raised whenever the same settings would give other numbers.
        settings: the settings that its numbers depend on, beside the arithmetic.
        default: measured unless others are asked for.
        readings: its numbers as they are drawn and fitted.
        option: further argument of a run that it reads, as an example.
        jacobians: whether it takes the Jacobians J_tt, which are made once for all measures that do.
        extra: Jacobians that it takes beside those of the depth and how many are held at a time, of a number of blocks, a
            position and the settings.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    run: Callable[[Batch], Sequence[MeasureResult]]
    version: int = 1
    settings: tuple[str, ...] = ()
    default: bool = False
    readings: tuple[Reading, ...] = ()
    option: str = ""
    jacobians: bool = False
    extra: Callable[[int, int, Settings], tuple[int, int]] | None = None

    def cast(self, found: MeasureResult) -> MeasureResult:
        """``found`` with its columns as records hold them.

        Returns:
            A new object with the same reasons and seconds.

        Raises:
            CouplingError: for a column that this measure does not have, or of another number of dimensions.
        """
        known = {column.name: column for column in self.columns}
        if unknown := [name for name in found.columns if name not in known]:
            raise CouplingError(
                f"got column {unknown[0]!r} of measure {self.name}, expected one of {', '.join(known)}"
            )
        return MeasureResult(
            {name: known[name].cast(v) for name, v in found.columns.items()},
            found.reasons,
            found.seconds,
        )


# Every record has these, whatever was measured.
PROMPT = (
    Column("tokens", "seq", "token ids of the prompt", "whole"),
    Column("position", "", "the token that was measured, from 0", "whole"),
    Column("ranks", "rank", "numbers K of top singular vectors, ascending", "whole"),
    Column("measures", "measure", "what was asked for", "text"),
)
OUTCOME = (
    Column(
        "seconds",
        "",
        "time it took, a batch's divided by its prompts; of reused numbers, when they were measured",
    ),
    Column(
        "reason", "", "in words, why something is missing or undefined; null if nothing is", "text"
    ),
    Column("reason_codes", "code", "the same as short codes to count by", "text"),
)
# What comes with every Jacobian J_tt, whichever measure asked for it.
JACOBIAN = (
    Column(
        "certificate",
        "layer",
        "relative error of each Jacobian against the model's own derivative along one direction",
    ),
    Column(
        "method",
        "layer",
        "level at which each Jacobian was computed: closed, token-local or autodiff",
        "text",
    ),
    Column(
        "slower_because",
        "layer",
        "why no faster level was taken, null where the fastest was",
        "text",
    ),
)


@functools.cache
def registered_measures() -> dict[str, Measure]:
    """Every measure by its name: what is measured unless others are asked for comes first, then by name."""
    names = [module.name for module in pkgutil.iter_modules(_package.__path__) if not module.ispkg]
    modules = [
        importlib.import_module(f"{_package.__name__}.{name}")
        for name in names
        if name != "registry"
    ]
    found = [measure for module in modules for measure in module.MEASURES]
    return {
        measure.name: measure for measure in sorted(found, key=lambda m: (not m.default, m.name))
    }


def default_measures() -> tuple[str, ...]:
    """What is measured unless others are asked for."""
    return tuple(name for name, measure in registered_measures().items() if measure.default)


def measured_columns() -> dict[str, Column]:
    """The columns of all measures, in their order; one that several measures record stands once."""
    return {
        column.name: column
        for measure in registered_measures().values()
        for column in measure.columns
    }


def record_columns() -> dict[str, Column]:
    """Every column of a record: what is known of the prompt, what was measured, how it went."""
    return (
        {column.name: column for column in PROMPT}
        | measured_columns()
        | {column.name: column for column in OUTCOME}
    )


def readings() -> dict[str, Reading]:
    """Every reading by its name, in the order of the measures."""
    return {
        reading.name: reading
        for measure in registered_measures().values()
        for reading in measure.readings
    }


def prompt_readings(names: Iterable[str] | None = None) -> list[Reading]:
    """The readings that are one number of a prompt, of all measures or of those named.

    They are what tasks are summarised with and what scores are compared to.

    Returns:
        In the order in which the measures are registered.
    """
    chosen = (
        registered_measures().values()
        if names is None
        else [registered_measures()[name] for name in registered_measures() if name in {*names}]
    )
    return [
        reading for measure in chosen for reading in measure.readings if reading.over == "prompt"
    ]


def measures_argument(names: Iterable[str]) -> str:
    """``coupling_measures=…`` with these measures beside those by default, in their order."""
    wanted = {*default_measures(), *names}
    return "coupling_measures=" + "+".join(name for name in registered_measures() if name in wanted)


def recording_option(column: str) -> str | None:
    """Arguments of a run that records ``column``; ``None`` if no measure does."""
    for measure in registered_measures().values():
        for known in measure.columns:
            if known.name == column:
                return known.option or ",".join(
                    filter(None, (measures_argument([measure.name]), measure.option))
                )
    return None
