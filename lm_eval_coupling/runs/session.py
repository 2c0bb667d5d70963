"""A session: weights, settings and store that measure any prompts any number of times."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lm_eval_coupling.errors import CouplingError, resolve_token
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.choices import chosen_positions, positions_at_most
from lm_eval_coupling.measures.registry import registered_measures
from lm_eval_coupling.measuring.prompt import groups, measure_prompts
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
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

Tokens = tuple[int, ...]
Recalled = dict[Tokens, dict[str, MeasureResult]]  # results by prompt and name of the measure
Batches = list[tuple[Settings, list[Tokens]]]  # prompts to measure together, with the measures


@dataclass(frozen=True)
class Subject:
    """A set of weights to measure: ``trained``, which is scored, or ``untrained``, its twin."""

    weights: str
    model: ResidualModel


@dataclass
class Measured:
    """Records of prompts, by the weights and the prompt's token ids.

    Attributes:
        records: the record of each prompt.
        reused: prompts whose whole record comes from the store.
        interrupted: True if Ctrl-C ended the measuring early.
    """

    records: dict[str, dict[Tokens, PromptCoupling]] = field(default_factory=dict)
    reused: dict[str, set[Tokens]] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, weights: str) -> dict[Tokens, PromptCoupling]:
        """Return the records of one set of weights."""
        return self.records.setdefault(weights, {})


@dataclass(frozen=True)
class Session:
    """Measures each prompt once, in batches, and keeps results in the store as they are made.

    Attributes:
        subjects: the weights to measure, the trained ones first.
        settings: what is measured of a prompt.
        position: the measured token, or several as a text.
        store: where results are kept and found again.
        quiet: True for every process except the one that reports.
        place: number of the measured token among those of ``position``; the headline value is of
            the first.
    """

    subjects: Sequence[Subject]
    settings: Settings
    position: int | str
    store: MeasurementStore
    quiet: bool = False
    place: int = 0

    @property
    def trained(self) -> Subject:
        """The scored weights."""
        return self.subjects[0]

    def at_every_place(self) -> Iterator[Session]:
        """Yield this session for each token that ``position`` names."""
        for place in range(positions_at_most(self.position)):
            yield dataclasses.replace(self, place=place)

    def has(self, tokens: Tokens) -> bool:
        """Return whether a prompt is long enough for another token at this place."""
        return self.place < len(chosen_positions(self.position, len(tokens)))

    def _position_in(self, tokens: Tokens) -> int:
        return chosen_positions(self.position, len(tokens))[self.place]

    def measure(self, prompts: Sequence[Tokens]) -> Measured:
        """Measure each distinct prompt once on each set of weights.

        Args:
            prompts: token ids; equal prompts are measured once.

        Returns:
            One record for every prompt and set of weights, also if it could not be measured. After
            Ctrl-C some prompts have none.
        """
        measured = Measured()
        recalled: dict[str, Recalled] = {}
        try:
            for subject in self.subjects:
                recalled[subject.weights] = self._recall(subject, prompts)
                measured.of(subject.weights).update(self._complete(recalled[subject.weights]))
                measured.reused[subject.weights] = set(measured.of(subject.weights))
            if prompts and not self.quiet:
                logger.info(
                    "coupling: on this process %s",
                    self._counted(prompts, len(set(prompts) - measured.reused[TRAINED])),
                )
            for subject in self.subjects:
                self._measure_missing(
                    subject, recalled[subject.weights], measured.of(subject.weights)
                )
        except KeyboardInterrupt:
            measured.interrupted = True
            done = sum(tokens in measured.of(TRAINED) for tokens in prompts)
            logger.warning(
                "coupling: interrupted, %d of %d prompts are measured and kept", done, len(prompts)
            )
        self._write_the_rest()
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

    def _key(self, subject: Subject, measure: str, tokens: Tokens) -> str:
        position = resolve_token(self._position_in(tokens), len(tokens))
        return self.store.key(
            subject.model.identity, measure, self.settings.for_measure(measure), tokens, position
        )

    def _recall(self, subject: Subject, prompts: Iterable[Tokens]) -> Recalled:
        """Return what the store has of these prompts, measure by measure."""
        recalled: Recalled = {}
        for tokens in dict.fromkeys(prompts):
            recalled[tokens] = {}
            for name in self.settings.measures:
                # A prompt without the measured token has no key; its record says so.
                with contextlib.suppress(CouplingError):
                    if (result := self.store.get(self._key(subject, name, tokens))) is not None:
                        recalled[tokens][name] = registered_measures()[name].cast(result)
        return recalled

    def _complete(self, recalled: Recalled) -> dict[Tokens, PromptCoupling]:
        """Return records of the prompts of which no measure is missing."""
        return {
            tokens: self._record(tokens, results)
            for tokens, results in recalled.items()
            if not self._missing(results)
        }

    def _missing(self, results: Mapping[str, MeasureResult]) -> tuple[str, ...]:
        return tuple(name for name in self.settings.measures if name not in results)

    def _record(self, tokens: Tokens, results: Mapping[str, MeasureResult]) -> PromptCoupling:
        position = resolve_token(self._position_in(tokens), len(tokens))
        ordered = {name: results[name] for name in self.settings.measures}
        return PromptCoupling(tokens, position, self.settings.ranks, ordered)

    def _keep(self, subject: Subject, records: Sequence[PromptCoupling]) -> None:
        """Store the results that would not change; memory that ran out may suffice next time."""
        settled = {
            self._key(subject, name, record.tokens): result
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

    def _write_the_rest(self) -> None:
        try:
            self.store.flush()
        except sqlite3.Error as error:
            logger.warning(
                "coupling: the store %s could not be written to the end (%s); "
                "this run's tables are complete, but another run measures again",
                *(self.store.path, error),
            )

    def _measure_missing(
        self, subject: Subject, recalled: Recalled, records: dict[Tokens, PromptCoupling]
    ) -> None:
        """Fill ``records``: prompts of similar length together, with the missing measures only."""
        batches = self._batches(subject, recalled)
        waiting = sum(len(batch) for _, batch in batches)
        if batches and not self.quiet:
            batches = _in_order(batches, subject.model.device)
            needed = memory_needed(subject.model, [batch for _, batch in batches], self.settings)
            logger.info("coupling: %s", needed)
        title = "Measuring coupling" + ("" if subject is self.trained else f", {subject.weights}")
        is_hidden = self.quiet or not waiting
        bar = tqdm(total=waiting, desc=title, bar_format=_BAR, disable=is_hidden)
        pace, left = Pace(workers()), waiting
        # Lines of the log go above the bar instead of through it.
        with bar, logging_redirect_tqdm():
            for number, (settings, batch) in enumerate(batches):
                positions = list(map(self._position_in, batch))
                measured = measure_prompts(subject.model, batch, positions, settings)
                self._keep(subject, measured)
                for record in measured:
                    records[record.tokens] = self._with_recalled(record, recalled)
                pace.add(len(batch))
                left -= len(batch)
                bar.set_postfix_str(f"{duration(left * pace.seconds)} left", refresh=False)
                bar.update(len(batch))
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

    def try_one(self, prompts: Sequence[Tokens]) -> list[str]:
        """Measure one prompt on each set of weights.

        Returns:
            A few lines on what measuring all of them would cost.
        """
        lines = []
        for subject in self.subjects:
            recalled = self._recall(subject, prompts)
            batches = _one_first(self._batches(subject, recalled))
            waiting = sum(len(batch) for _, batch in batches)
            lines.append(f"{subject.weights} weights: {self._counted(prompts, waiting)}")
            if not batches:
                continue
            settings, batch = batches[0]
            positions = list(map(self._position_in, batch))
            measured = measure_prompts(subject.model, batch, positions, settings)
            self._keep(subject, measured)
            left = waiting - len(measured)
            lines.append(seconds_needed(subject.model, measured, left, self.settings))
            lines.append(
                memory_needed(subject.model, [batch for _, batch in batches], self.settings)
            )
        return lines

    def _with_recalled(self, record: PromptCoupling, recalled: Recalled) -> PromptCoupling:
        results = {**recalled[record.tokens], **record.results}
        ordered = {name: results[name] for name in self.settings.measures}
        return dataclasses.replace(record, results=ordered)

    def _counted(self, prompts: Sequence[Tokens], waiting: int) -> str:
        distinct = len(set(prompts))
        before = distinct - waiting
        return f"{len(prompts)} prompts, {distinct} of them distinct, {before} measured before"

    def _batches(self, subject: Subject, recalled: Recalled) -> Batches:
        """Group the prompts to measure together, with the measures that all of them lack."""
        by_measures: dict[tuple[str, ...], list[Tokens]] = {}
        for tokens, results in recalled.items():
            if missing := self._missing(results):
                by_measures.setdefault(missing, []).append(tokens)
        batches = []
        for missing, prompts in by_measures.items():
            settings = dataclasses.replace(self.settings, measures=missing)
            batches += [
                (settings, [prompts[i] for i in group])
                for group in groups(subject.model, prompts, settings)
            ]
        return batches


def _in_order(batches: Batches, device: torch.device) -> Batches:
    """Put first what tells the cost of all soonest."""
    # A device needs as much time for one prompt as for many.
    if device.type == "cpu":
        return _one_first(batches)
    middle = len(batches) // 2
    return [batches[middle], *batches[:middle], *batches[middle + 1 :]]


def _one_first(batches: Batches) -> Batches:
    """Put a prompt of median length alone before the others."""
    if not batches:
        return []
    middle = len(batches) // 2
    settings, batch = batches[middle]
    at = len(batch) // 2
    others = [(settings, rest)] if (rest := [*batch[:at], *batch[at + 1 :]]) else []
    return [(settings, [batch[at]]), *others, *batches[:middle], *batches[middle + 1 :]]
