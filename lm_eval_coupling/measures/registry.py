"""Registry of measures: columns, readings and measures in one form. NumPy only.

Records, the store, tables, summaries, fits and docs/measures.md are derived from it. A measure is
one file of this package that ends in ``MEASURES = (Measure(…),)``: its columns, the function that
fills them, and the readings that are drawn and fitted. It imports torch only inside the functions
that compute, so that readers of results know the columns without torch.

Shapes are written as in jaxtyping, over these sizes: ``rank`` (numbers K that were asked for),
``max_rank``, ``layer``, ``seq`` (tokens of the prompt), ``token`` and ``chosen`` (tokens and blocks
that a measure over tokens compares), ``window``, ``component`` and ``d_model``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from lm_eval_coupling import measures as _package
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.contract import Batch, MeasureResult, Settings


@runtime_checkable
class Record(Protocol):
    """Source of columns by name: a measured prompt, or a row of a table as a dict."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the column ``name``."""


@dataclasses.dataclass(frozen=True)
class Column:
    """Column of a record.

    Attributes:
        name: its name in records and tables.
        shape: names of its dimensions, "" for a single value.
        doc: definition, unit and source.
        kind: type of its values. Numbers are float32 in arrays and float64 alone; doubles are
            float64 in arrays too.
        option: argument of a run that records it, where asking for its measure is not enough.
    """

    name: str
    shape: str = ""
    doc: str = ""
    kind: Literal["number", "double", "whole", "text", "bytes"] = "number"
    option: str = ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the dimensions of an array; empty for a single value."""
        return tuple(self.shape.split())

    @property
    def missing(self) -> float | None:
        """Placeholder where nothing was measured."""
        return math.nan if self.kind == "number" and not self.shape else None

    def cast(self, value: Any) -> Any:
        """Return ``value`` as records hold it: a float32 array, a tuple, one Python value, or None.

        Raises:
            CouplingError: if the number of dimensions differs from the column's.
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
    """Number of a prompt, or of each place in depth, as it is drawn and fitted.

    Attributes:
        name: name in tables of studies and as a predictor.
        label: caption in pictures.
        column: column that it is read from; without the column there is no reading.
        read: function of a record and a rank K.
        over: places that have a value: the ``prompt``, each ``block``, each ``point`` of the stream
            (x^0 first), or each ``window`` of blocks.
        of_rank: whether it depends on K.
        sign: expected direction with the score, 1 or −1; 0 where there is no expectation.
        chance: function of K: the expected value for unrelated layers.
        log: whether it is drawn on a logarithmic axis.
        doc: what it tells, in plain words.
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
    doc: str = ""

    def chance_at(self, rank: int) -> float:
        """Return the value at chance; NaN where chance is not defined."""
        return math.nan if self.chance is None else self.chance(rank)

    def in_depth(self, record: Record, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return depths and the values at these depths, in float64.

        Depth 0 is the input of the first block. Depth l is block l or its output. A window has the
        depth of its center, a whole prompt the depth NaN.
        """
        values = np.atleast_1d(np.asarray(self.read(record, rank), dtype=np.float64))
        if self.over == "prompt":
            return np.full(len(values), math.nan), values
        first = {"point": 0, "block": 1, "window": int(record["window"] or 0) / 2}[self.over]
        return np.arange(float(len(values))) + first, values


def column_reading(name: str, label: str, **options: Any) -> Reading:
    """Return a reading that is the column of its name unchanged."""
    return Reading(name, label, name, lambda record, rank: record[name], **options)


def ranked_reading(name: str, label: str, column: str, **options: Any) -> Reading:
    """Return a reading of a column [rank]: one number of the prompt for each K."""

    def read(record: Record, rank: int) -> float:
        values = record[column]
        return math.nan if values is None else float(values[list(record["ranks"]).index(rank)])

    return Reading(name, label, column, read, of_rank=True, **options)


def mean_reading(
    name: str,
    label: str,
    column: str,
    summary: Callable[[np.ndarray], float] | None = None,
    doc: str = "",
) -> Reading:
    """Return a reading that summarizes a column over depth, by default its mean.

    Args:
        name: name of the reading.
        label: caption in pictures.
        column: column with one value for each depth.
        summary: function of the column in float64. The mean takes defined values only.
        doc: what it tells, in plain words.
    """

    def read(record: Record, rank: int) -> float:
        column_values = record[column]
        if column_values is None:
            return math.nan
        values = np.asarray(column_values, np.float64)
        if summary is not None:
            return float(summary(values))
        defined = values[np.isfinite(values)]
        return float(defined.mean()) if len(defined) else math.nan

    return Reading(name, label, column, read, doc=doc)


@dataclasses.dataclass(frozen=True)
class SampleReading:
    """Number of a sample of documents as it is fitted, such as how far their vectors spread.

    Attributes:
        name: name in summaries and as a predictor.
        label: caption in pictures.
        column: column with one vector per prompt; a document's is the mean over its prompts.
        read: function of the vectors [document, dimension] in float64.
        fewest: documents below which it is undefined.
        sign: expected direction with the score, 1 or −1; 0 where there is no expectation.
        doc: what it tells, in plain words.
    """

    name: str
    label: str
    column: str
    read: Callable[[np.ndarray], float]
    fewest: int
    sign: int = 0
    doc: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measure, asked for by name with ``coupling_measures``.

    Attributes:
        name: name to ask for.
        doc: meaning, in a few sentences.
        columns: columns that it records.
        run: function of a batch that returns one result for each prompt.
        version: number to raise whenever the same settings would give other values.
        settings: settings that its values depend on, besides the arithmetic.
        default: whether it is measured unless others are asked for.
        readings: its values as they are drawn and fitted.
        sample_readings: its values over a sample of documents.
        option: another argument of a run that it reads, as an example.
        jacobians: whether it takes the Jacobians J_tt, which all such measures share.
        extra: function of the number of blocks, a position and the settings. It returns the number
            of Jacobians taken besides J_tt, and the number held in memory at a time.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    run: Callable[[Batch], Sequence[MeasureResult]]
    version: int = 1
    settings: tuple[str, ...] = ()
    default: bool = False
    readings: tuple[Reading, ...] = ()
    sample_readings: tuple[SampleReading, ...] = ()
    option: str = ""
    jacobians: bool = False
    extra: Callable[[int, int, Settings], tuple[int, int]] | None = None

    def cast(self, result: MeasureResult) -> MeasureResult:
        """Return ``result`` with its columns in the form of records.

        Raises:
            CouplingError: for a column that this measure lacks, or of another number of dimensions.
        """
        columns = {column.name: column for column in self.columns}
        if unknown := [name for name in result.columns if name not in columns]:
            raise CouplingError(
                f"got column {unknown[0]!r} of measure {self.name}, "
                f"expected one of {', '.join(columns)}"
            )
        values = {name: columns[name].cast(value) for name, value in result.columns.items()}
        return dataclasses.replace(result, columns=values)


def prompt_by_prompt(
    name: str, measure: Callable[[Any], MeasureResult]
) -> Callable[[Batch], Sequence[MeasureResult]]:
    """Return the ``run`` of the measure ``name``, which takes one prompt of a batch at a time."""
    return lambda batch: batch.measure_each(measure, name)


# Columns of every record, whatever was measured.
PROMPT = (
    Column("tokens", "seq", "token ids of the prompt", "whole"),
    Column("position", "", "measured token, from 0", "whole"),
    Column("ranks", "rank", "numbers K of top singular vectors, ascending", "whole"),
    Column("measures", "measure", "measures that were asked for", "text"),
)
OUTCOME = (
    Column(
        "seconds",
        "",
        "time taken, a batch's divided by its prompts; for reused numbers, when they were measured",
    ),
    Column("reason", "", "reasons for missing or undefined values; null if there are none", "text"),
    Column("reason_codes", "code", "the same reasons as short codes to count by", "text"),
)
# Columns that come with every Jacobian J_tt, whichever measure asked for it.
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
        "reason why no faster level was taken, null where the fastest was",
        "text",
    ),
)
# Modules of this package that define no measure.
_OTHER_MODULES = {"contract", "registry"}


@functools.cache
def registered_measures() -> dict[str, Measure]:
    """Return all measures by name: default measures first, then alphabetically."""
    modules = [
        importlib.import_module(f"{_package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(_package.__path__)
        if not module.ispkg and module.name not in _OTHER_MODULES
    ]
    measures = [measure for module in modules for measure in module.MEASURES]
    measures.sort(key=lambda measure: (not measure.default, measure.name))
    return {measure.name: measure for measure in measures}


def default_measures() -> tuple[str, ...]:
    """Return the names of the measures that are taken unless others are asked for."""
    return tuple(name for name, measure in registered_measures().items() if measure.default)


def measured_columns() -> dict[str, Column]:
    """Return the columns of all measures by name, shared ones once."""
    return {
        column.name: column
        for measure in registered_measures().values()
        for column in measure.columns
    }


def record_columns() -> dict[str, Column]:
    """Return all columns of a record: the prompt's, the measured ones, the outcome's."""
    return (
        {column.name: column for column in PROMPT}
        | measured_columns()
        | {column.name: column for column in OUTCOME}
    )


def readings() -> dict[str, Reading]:
    """Return all readings by name, in the order of the measures."""
    return {
        reading.name: reading
        for measure in registered_measures().values()
        for reading in measure.readings
    }


def prompt_readings(names: Iterable[str] | None = None) -> list[Reading]:
    """Return the readings that are one number of a prompt, which summaries and fits take.

    Args:
        names: measures to choose from, by default all of them.
    """
    chosen = None if names is None else {*names}
    return [
        reading
        for name, measure in registered_measures().items()
        if chosen is None or name in chosen
        for reading in measure.readings
        if reading.over == "prompt"
    ]


@functools.cache
def sample_readings() -> dict[str, SampleReading]:
    """Return all readings of samples of documents by name."""
    return {
        reading.name: reading
        for measure in registered_measures().values()
        for reading in measure.sample_readings
    }


def measures_argument(names: Iterable[str]) -> str:
    """Return the argument ``coupling_measures=…`` for the default measures and these."""
    chosen = {*default_measures(), *names}
    return "coupling_measures=" + "+".join(name for name in registered_measures() if name in chosen)


def recording_option(column_name: str) -> str | None:
    """Return the arguments of a run that records a column; None if no measure does."""
    for measure in registered_measures().values():
        for column in measure.columns:
            if column.name == column_name:
                arguments = (measures_argument([measure.name]), measure.option)
                return column.option or ",".join(filter(None, arguments))
    return None
