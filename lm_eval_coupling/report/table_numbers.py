"""Means over the documents of coupling tables, computed for many tables at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_coupling.measures.formulas import means
from lm_eval_coupling.measures.formulas.certificates import largest_certificate
from lm_eval_coupling.saved.arrow_columns import frame_of_columns
from lm_eval_coupling.saved.saved_table import SavedTable, passing_over
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED
from lm_eval_coupling.saved.values import document_values, prompt_columns, ranks_of
from lm_eval_coupling.statistics.estimates import Estimate

# Frames of few rows take as long as those of thousands: tables are joined up to this many prompts.
_PROMPTS_AT_ONCE = 4096

PromptColumns = Mapping[str, np.ndarray]
Mean = tuple[float, float, int]  # mean, standard error and number of documents
_NOTHING: Mean = (math.nan, math.nan, 0)


@dataclasses.dataclass(frozen=True)
class TableNumbers:
    """Means over the documents of one table.

    Attributes:
        ranks: numbers K that were measured.
        means: mean of every number of :func:`~lm_eval_coupling.saved.values.prompt_values`.
        twin_means: the same of the untrained weights; empty where these were not measured.
        differences: trained less untrained weights by ``coupling@K``
            (:func:`describe_differences`); empty without untrained weights.
        worst_certificate: largest certificate of the trained weights' Jacobians that gave a number,
            at any measured token.
        missing: the reasons of prompts without coupling, counted, in words.
    """

    ranks: Sequence[int]
    means: Mapping[str, Mean]
    twin_means: Mapping[str, Mean]
    differences: Mapping[str, Mapping[str, float | int]]
    worst_certificate: float
    missing: str

    def coupling(self, rank: int | None) -> Mean:
        """Return the mean coupling at a rank."""
        return self.means.get(f"coupling@{rank}", _NOTHING)

    def twin_coupling(self, rank: int | None) -> Mean:
        """Return the mean coupling of the untrained weights at a rank."""
        return self.twin_means.get(f"coupling@{rank}", _NOTHING)

    def difference(self, rank: int | None) -> Mapping[str, float | int]:
        """Return the paired difference of coupling at a rank."""
        return self.differences.get(f"coupling@{rank}") or describe_differences(())


def read_columns(
    tables: Iterable[SavedTable], problems: list[str]
) -> Iterator[tuple[int, PromptColumns]]:
    """Yield the place of each table that can be read, and the numbers of its prompts.

    Args:
        tables: of one task each.
        problems: a sentence on each table that cannot be read is added.
    """
    for place, table in enumerate(tables):
        with passing_over(problems):
            yield place, prompt_columns(table, "all")


def table_numbers(
    tables: Iterable[tuple[int, PromptColumns]],
) -> Iterator[tuple[int, TableNumbers]]:
    """Yield the place of each table and its numbers.

    Args:
        tables: ascending places and the columns of :func:`~.values.prompt_columns` of both weights;
            readings that a table lacks are left out of its means.
    """
    part: dict[int, PromptColumns] = {}
    prompts = 0
    for place, columns in tables:
        part[place] = columns
        prompts += len(columns["doc_hash"])
        if prompts >= _PROMPTS_AT_ONCE:
            yield from _numbers(part)
            part, prompts = {}, 0
    if part:
        yield from _numbers(part)


def _numbers(part: Mapping[int, PromptColumns]) -> Iterator[tuple[int, TableNumbers]]:
    """Yield the numbers of tables that are computed together."""
    values = _join(part)
    trained, twin = (_Side(values[values["weights"] == of]) for of in (TRAINED, UNTRAINED))
    differences = trained.less(twin)
    for place, columns in part.items():
        own, rows = trained.documents_of(place), trained.prompts_of(place)
        of_twin, names = twin.documents_of(place), [n for n in trained.numbers if n in columns]
        couplings = [name for name in names if name.startswith("coupling@")]
        has_twin = of_twin.stop > of_twin.start
        yield (
            place,
            TableNumbers(
                ranks=ranks_of(columns),
                means=_means(trained.numbers, names, own),
                twin_means=_means(twin.numbers, names, of_twin) if has_twin else {},
                differences={
                    name: describe_differences(differences[name][own])
                    for name in (couplings if has_twin else ())
                },
                worst_certificate=largest_certificate(trained.certificates[rows].tolist()),
                missing=_in_words(trained.reasons[rows][trained.is_missing[rows]]),
            ),
        )


def _join(part: Mapping[int, PromptColumns]) -> pd.DataFrame:
    """Join the columns of several tables; ``table`` is the place of each row's table."""
    sizes = {place: len(columns["doc_hash"]) for place, columns in part.items()}
    names = dict.fromkeys(name for columns in part.values() for name in columns)
    joined = {
        name: np.concatenate(
            [
                columns[name] if name in columns else np.full(sizes[place], math.nan)
                for place, columns in part.items()
            ]
        )
        for name in names
    }
    return frame_of_columns({"table": np.repeat([*sizes], [*sizes.values()])} | joined)


class _Side:
    """Rows of the trained or of the untrained weights, in the order of their tables."""

    def __init__(self, values: pd.DataFrame) -> None:
        self.documents = document_values(values)
        self.numbers = {name: self.documents[name].to_numpy() for name in self.documents}
        self.certificates = values["worst_certificate"].to_numpy()
        self.reasons = values["reason"].to_numpy()
        couplings = [name for name in values if str(name).startswith("coupling@")]
        self.is_missing = values[couplings].isna().all(axis=1).to_numpy()
        self._tables = values["table"].to_numpy()
        has_documents = len(self.documents) > 0
        self._tables_of_documents = (
            self.documents.index.get_level_values("table").to_numpy()
            if has_documents
            else self._tables[:0]
        )

    def prompts_of(self, place: int) -> slice:
        """Return where the prompts of a table stand."""
        return slice(*np.searchsorted(self._tables, [place, place + 1]))

    def documents_of(self, place: int) -> slice:
        """Return where the documents of a table stand."""
        return slice(*np.searchsorted(self._tables_of_documents, [place, place + 1]))

    def less(self, twin: _Side) -> dict[str, np.ndarray]:
        """Return the differences from the twin's documents; NaN where one of both has no value."""
        if not len(twin.documents) or not len(self.documents):
            return dict.fromkeys(self.numbers, np.empty(0))
        paired = twin.documents.reindex(self.documents.index)
        return {name: self.numbers[name] - paired[name].to_numpy() for name in self.numbers}


def _means(
    numbers: Mapping[str, np.ndarray], names: Iterable[str], documents: slice
) -> dict[str, Mean]:
    summaries = {name: means.mean_and_error(numbers[name][documents].tolist()) for name in names}
    return {name: (s["mean"], s["stderr"], int(s["n"])) for name, s in summaries.items()}


def describe_differences(differences: Iterable[float]) -> dict[str, float | int]:
    """Return ``difference``, the mean over the ``paired`` documents that have a value.

    With it come ``difference_stderr`` and Student's 95 % interval, ``difference_low`` and
    ``difference_high``.
    """
    summary = means.mean_and_error(differences)
    mean, error, n = summary["mean"], summary["stderr"], int(summary["n"])
    # Quantiles take longer than all means of a table.
    estimate = Estimate.from_t(mean, error, n - 1, 0.95) if n > 1 else Estimate()
    return {
        "paired": n,
        "difference": mean,
        "difference_stderr": error,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
    }


def _in_words(reasons: Iterable[Any]) -> str:
    """Count the reasons of prompts without coupling."""
    counted = Counter(reason or "not asked for" for reason in reasons)
    return "; ".join(f"{count} × {reason}" for reason, count in counted.most_common())
