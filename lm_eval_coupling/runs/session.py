"""A session: weights, settings and store that measure any prompts any number of times."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lm_eval_coupling.errors import CouplingError, message_of
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.registry import registered_measures
from lm_eval_coupling.measuring.prompt import (
    groups_of_texts,
    measure_prompts,
    moving_by_blocks,
)
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.workers import workers
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.cost import Pace, duration, memory_needed, seconds_needed
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.tables import TRAINED

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")

# The remaining time is ours: tqdm's own counts the first prompt, which is slower than the others.
_BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}{postfix}]"  # may stand between two prompts


class Spot(NamedTuple):
    """A token of a text: what one record is about.

    Attributes:
        tokens: token ids of the text.
        position: index from 0; a token that the text lacks is kept as it was named, so that its
            record can give the reason.
    """

    tokens: tuple[int, ...]
    position: int

    @classmethod
    def at(cls, tokens: tuple[int, ...], position: int) -> Spot:
        """Return a spot whose position may be given from the end."""
        exists = -len(tokens) <= position < len(tokens)
        return cls(tokens, position % len(tokens) if exists else position)

    @property
    def exists(self) -> bool:
        """False if the text lacks the token."""
        return 0 <= self.position < len(self.tokens)


Recalled = dict[Spot, dict[str, MeasureResult]]  # results by spot and name of the measure
Batches = list[tuple[Settings, list[Spot]]]  # spots of one pass, with the measures


@dataclass(frozen=True)
class Subject:
    """A set of weights to measure: ``trained``, which is scored, or ``untrained``, its twin."""

    weights: str
    model: ResidualModel


@dataclass
class Measured:
    """Records of prompts, by the weights and the spot.

    Attributes:
        records: the record of each spot.
        reused: spots whose whole record comes from the store.
        interrupted: True if Ctrl-C ended the measuring early.
        unstored: why the store lacks some of the records; empty if it has all.
    """

    records: dict[str, dict[Spot, PromptCoupling]] = field(default_factory=dict)
    reused: dict[str, set[Spot]] = field(default_factory=dict)
    interrupted: bool = False
    unstored: str = ""

    def of(self, weights: str) -> dict[Spot, PromptCoupling]:
        """Return the records of one set of weights."""
        return self.records.setdefault(weights, {})


@dataclass(frozen=True)
class Session:
    """Measures each spot once, in batches, and keeps results in the store as they are made.

    Attributes:
        subjects: the weights to measure, the trained ones first.
        settings: what is measured of a prompt.
        position: the measured token, or several as a text.
        store: where results are kept and found again.
        quiet: True for every process except the one that reports.
    """

    subjects: Sequence[Subject]
    settings: Settings
    position: int | str
    store: MeasurementStore
    quiet: bool = False

    @property
    def trained(self) -> Subject:
        """The scored weights."""
        return self.subjects[0]

    def measure(self, spots: Sequence[Spot]) -> Measured:
        """Measure each distinct spot once on each set of weights.

        Args:
            spots: tokens to measure at; equal ones are measured once.

        Returns:
            One record for every spot and set of weights, also if it could not be measured. After
            Ctrl-C some spots have none.
        """
        measured = Measured()
        recalled: dict[str, Recalled] = {}
        try:
            for subject in self.subjects:
                recalled[subject.weights] = self._recall(subject, spots)
                measured.of(subject.weights).update(self._complete(recalled[subject.weights]))
                measured.reused[subject.weights] = set(measured.of(subject.weights))
            if spots and not self.quiet:
                logger.info(
                    "coupling: on this process %s",
                    self._counted(spots, len(set(spots) - measured.reused[TRAINED])),
                )
            for subject in self.subjects:
                self._measure_missing(
                    subject, recalled[subject.weights], measured.of(subject.weights)
                )
        except KeyboardInterrupt:
            measured.interrupted = True
            done = sum(spot in measured.of(TRAINED) for spot in spots)
            logger.warning(
                "coupling: interrupted, %d of %d prompts are measured and kept", done, len(spots)
            )
        measured.unstored = self._write_the_rest()
        self._explain_slow_levels(measured.of(TRAINED).values())
        return measured

    def _explain_slow_levels(self, records: Iterable[PromptCoupling]) -> None:
        """Log once why blocks were measured at a slower level than the fastest.

        Each record says it block by block.
        """
        causes = Counter(why for record in records for why in record.slower_because or () if why)
        if not causes or self.quiet:
            return
        listed = "; ".join(f"{number} × {cause}" for cause, number in causes.most_common(3))
        others = f"; and {len(causes) - 3} reasons more" if len(causes) > 3 else ""
        logger.info(
            "coupling: %d Jacobians came from a slower level than the fastest: %s%s",
            *(causes.total(), listed, others),
        )

    def _key(self, subject: Subject, measure: str, spot: Spot) -> str:
        settings = self.settings.for_measure(measure)
        return self.store.key(subject.model.identity, measure, settings, *spot)

    def _recall(self, subject: Subject, spots: Iterable[Spot]) -> Recalled:
        """Return what the store has of these spots, measure by measure."""
        recalled: Recalled = {}
        for spot in dict.fromkeys(spots):
            recalled[spot] = {}
            for name in self.settings.measures if spot.exists else ():
                # An entry of another release is not cast, and is measured again.
                with contextlib.suppress(CouplingError):
                    if (result := self.store.get(self._key(subject, name, spot))) is not None:
                        recalled[spot][name] = registered_measures()[name].cast(result)
        return recalled

    def _complete(self, recalled: Recalled) -> dict[Spot, PromptCoupling]:
        """Return records of the spots of which no measure is missing."""
        return {
            spot: self._record(spot, results)
            for spot, results in recalled.items()
            if not self._missing(results)
        }

    def _missing(self, results: Mapping[str, MeasureResult]) -> tuple[str, ...]:
        return tuple(name for name in self.settings.measures if name not in results)

    def _record(self, spot: Spot, results: Mapping[str, MeasureResult]) -> PromptCoupling:
        ordered = {name: results[name] for name in self.settings.measures}
        return PromptCoupling(*spot, self.settings.ranks, ordered)

    def _keep(self, subject: Subject, records: Sequence[PromptCoupling]) -> None:
        """Store the results that would not change; memory that ran out may suffice next time."""
        settled = {
            self._key(subject, name, spot_of(record)): result
            for record in records
            for name, result in record.results.items()
            if result.settled
        }
        try:
            if settled:
                self.store.put(settled)
        except Exception as error:
            # An error of the file would recur for each prompt; the store tries again by itself.
            if len(records) == 1 or isinstance(error, sqlite3.Error):
                logger.warning(
                    "coupling: what was measured of %d prompts could not be stored (%s); "
                    "it stays in this run's tables",
                    *(len(records), error),
                )
                return
            for record in records:  # an error of one prompt must not cost the others
                self._keep(subject, [record])

    def _write_the_rest(self) -> str:
        """Write what the store lacks, and return a sentence on why it cannot be written, or ""."""
        try:
            self.store.flush()
        except sqlite3.Error as error:
            logger.warning(
                "coupling: the store %s could not be written to the end (%s); "
                "this run's tables are complete, but another run measures again",
                *(self.store.path, error),
            )
            reason = message_of(error)
            return f"got {self.store.path} as the store, which could not be completed ({reason})"
        return ""

    def _measure_missing(
        self, subject: Subject, recalled: Recalled, records: dict[Spot, PromptCoupling]
    ) -> None:
        """Fill ``records``: prompts of similar length together, with the missing measures only."""

        def keep(measured: Sequence[PromptCoupling]) -> None:
            self._keep(subject, measured)
            for record in measured:
                spot = spot_of(record)
                records[spot] = self._record(spot, {**recalled[spot], **record.results})

        batches = self._batches(subject, recalled)
        waiting = sum(len(batch) for _, batch in batches)
        if batches and not self.quiet:
            batches = _in_order(batches, subject.model.device)
            logger.info("coupling: %s", self._memory_needed(subject, batches))
        title = "Measuring coupling" + ("" if subject is self.trained else f", {subject.weights}")
        is_hidden = self.quiet or not waiting
        bar = tqdm(total=waiting, desc=title, bar_format=_BAR, disable=is_hidden)
        pace, left, done = Pace(workers()), waiting, 0
        # Lines of the log go above the bar instead of through it.
        with bar, logging_redirect_tqdm():
            for number, (settings, batch) in enumerate(batches):
                done += len(batch)
                with moving_by_blocks(bar, done, subject.model.n_layers):
                    measured = _measure(subject, batch, settings, keep)
                pace.add(len(batch))
                left -= len(batch)
                bar.set_postfix_str(f"{duration(left * pace.seconds)} left", refresh=False)
                if self.quiet:
                    continue
                if number == 0:
                    cost = seconds_needed(subject.model, measured, left, self.settings)
                    logger.info("coupling: %s", cost)
                elif number == 1 and left:
                    each, rest = duration(pace.seconds), duration(left * pace.seconds)
                    logger.info("coupling: the next prompts took %s each; %s left", each, rest)
                if subject.model.device.type == "cpu" and (words := pace.slowed_by()):
                    logger.warning("coupling: %s", words)

    def try_one(self, spots: Sequence[Spot]) -> list[str]:
        """Return lines on what measuring all spots would cost, after one on each set of weights."""
        lines = []
        for subject in self.subjects:
            recalled = self._recall(subject, spots)
            batches = _one_first(self._batches(subject, recalled))
            waiting = sum(len(batch) for _, batch in batches)
            lines.append(f"{subject.weights} weights: {self._counted(spots, waiting)}")
            if not batches:
                continue
            settings, batch = batches[0]
            measured = _measure(subject, batch, settings, functools.partial(self._keep, subject))
            left = waiting - len(measured)
            lines.append(seconds_needed(subject.model, measured, left, self.settings))
            lines.append(self._memory_needed(subject, batches))
        return lines

    def _memory_needed(self, subject: Subject, batches: Batches) -> str:
        texts = [list(dict.fromkeys(spot.tokens for spot in batch)) for _, batch in batches]
        return memory_needed(subject.model, texts, self.settings)

    def _counted(self, spots: Sequence[Spot], waiting: int) -> str:
        distinct = len(set(spots))
        before = distinct - waiting
        return f"{len(spots)} prompts, {distinct} of them distinct, {before} measured before"

    def _batches(self, subject: Subject, recalled: Recalled) -> Batches:
        """Group the spots to measure together, with the measures that all of them lack."""
        by_measures: dict[tuple[str, ...], list[Spot]] = {}
        for spot, results in recalled.items():
            if missing := self._missing(results):
                by_measures.setdefault(missing, []).append(spot)
        batches: Batches = []
        for missing, spots in by_measures.items():
            settings = dataclasses.replace(self.settings, measures=missing)
            texts = [spot.tokens for spot in spots]
            batches += [
                (settings, [spots[i] for i in group])
                for group in groups_of_texts(subject.model, texts, settings)
            ]
        return batches


def _measure(
    subject: Subject,
    batch: Sequence[Spot],
    settings: Settings,
    keep: Callable[[Sequence[PromptCoupling]], None],
) -> list[PromptCoupling]:
    """Return a record for each spot of a batch, traced in one pass.

    The first spots of every text go first, then the second; ``keep`` gets the records as they are
    made.
    """
    turns: dict[tuple[int, ...], int] = {}
    parts: list[list[int]] = []
    for index, spot in enumerate(batch):
        turn = turns.get(spot.tokens, 0)
        turns[spot.tokens] = turn + 1
        parts += [[]] if turn == len(parts) else []
        parts[turn].append(index)
    texts, positions = zip(*batch, strict=True)
    return measure_prompts(subject.model, texts, positions, settings, parts, keep)


def spot_of(record: PromptCoupling) -> Spot:
    """Return the spot that a record is about."""
    return Spot(record.tokens, record.position)


def _in_order(batches: Batches, device: torch.device) -> Batches:
    """Put first what tells the cost of all soonest."""
    # A device needs as much time for one prompt as for many.
    if device.type == "cpu":
        return _one_first(batches)
    middle = len(batches) // 2
    return [batches[middle], *batches[:middle], *batches[middle + 1 :]]


def _one_first(batches: Batches) -> Batches:
    """Put a text of median length alone before the others."""
    if not batches:
        return []
    middle = len(batches) // 2
    settings, batch = batches[middle]
    tokens = batch[len(batch) // 2].tokens
    alone = [spot for spot in batch if spot.tokens == tokens]
    rest = [spot for spot in batch if spot.tokens != tokens]
    others = [(settings, rest)] if rest else []
    return [(settings, alone), *others, *batches[:middle], *batches[middle + 1 :]]
