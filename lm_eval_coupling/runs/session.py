"""What a run measures with: the weights in question, the settings, the store; any number of times, any prompts."""

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

from lm_eval_coupling.errors import CouplingError, resolve_token
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.choices import chosen_positions, positions_at_most
from lm_eval_coupling.measures.registry import registered_measures
from lm_eval_coupling.measuring.prompt import groups, measure_prompts
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.cost import memory_needed, seconds_needed
from lm_eval_coupling.runs.store import MeasurementStore
from lm_eval_coupling.saved.tables import TRAINED

logger = logging.getLogger(
    "lm_eval.coupling"
)  # below lm-eval's own, so that its verbosity and handler apply

Tokens = tuple[int, ...]
Known = dict[Tokens, dict[str, MeasureResult]]  # by the name of the measure


@dataclass(frozen=True)
class Subject:
    """Weights whose coupling is measured: ``trained``, those that are scored, or ``untrained``."""

    weights: str
    model: ResidualModel


@dataclass
class Measured:
    """What is known of the prompts that were asked for, by the weights and the prompt's token ids."""

    records: dict[str, dict[Tokens, PromptCoupling]] = field(default_factory=dict)
    reused: dict[str, set[Tokens]] = field(default_factory=dict)
    """By the weights, the prompts whose whole record comes from the store."""
    interrupted: bool = False

    def of(self, weights: str) -> dict[Tokens, PromptCoupling]:
        """Records of one set of weights."""
        return self.records.setdefault(weights, {})


@dataclass(frozen=True)
class Session:
    """Measures prompts once each: in batches, kept in the store as they are made, found there by later runs."""

    subjects: Sequence[Subject]
    settings: Settings
    position: int | str
    store: MeasurementStore
    quiet: bool = False
    """Neither a bar nor a word of the cost: one process of several speaks for all."""
    place: int = 0
    """Which of the tokens that ``position`` names is measured; the headline is of the first."""

    @property
    def trained(self) -> Subject:
        """The weights that are scored."""
        return self.subjects[0]

    def at_every_place(self) -> Iterator[Session]:
        """This session for each token of a prompt that ``position`` names."""
        for place in range(positions_at_most(self.position)):
            yield dataclasses.replace(self, place=place)

    def has(self, tokens: Tokens) -> bool:
        """Whether a prompt is long enough for another token at this place."""
        return self.place < len(chosen_positions(self.position, len(tokens)))

    def _asked(self, tokens: Tokens) -> int:
        return chosen_positions(self.position, len(tokens))[self.place]

    def measure(self, prompts: Sequence[Tokens]) -> Measured:
        """Measure each distinct prompt once on each set of weights.

        Args:
            prompts: token ids; equal ones are one.

        Returns:
            One record for every prompt and set of weights, also where it could not be measured. Ctrl-C keeps what is there:
            then some have none.
        """
        measured = Measured()
        known: dict[str, Known] = {}
        try:
            for subject in self.subjects:
                known[subject.weights] = self._recalled(subject, prompts)
                measured.of(subject.weights).update(self._complete(known[subject.weights]))
                measured.reused[subject.weights] = set(measured.of(subject.weights))
            if prompts and not self.quiet:
                logger.info(
                    "coupling: on this process %s",
                    self._counted(prompts, len(set(prompts) - measured.reused[TRAINED])),
                )
            for subject in self.subjects:
                self._measure_missing(subject, known[subject.weights], measured.of(subject.weights))
        except KeyboardInterrupt:
            measured.interrupted = True
            done = sum(tokens in measured.of(TRAINED) for tokens in prompts)
            logger.warning(
                "coupling: interrupted, %d of %d prompts are measured and kept", done, len(prompts)
            )
        self._tell_slower(measured.of(TRAINED).values())
        return measured

    def _tell_slower(self, records: Iterable[PromptCoupling]) -> None:
        """Once a run, why blocks were measured at a slower level than the fastest; each record says it block by block."""
        found = Counter(why for record in records for why in record.slower_because or () if why)
        if not found or self.quiet:
            return
        told = "; ".join(f"{number} × {why}" for why, number in found.most_common(3))
        others = f"; and {len(found) - 3} reasons more" if len(found) > 3 else ""
        logger.info(
            "coupling: %d Jacobians came from a slower level than the fastest: %s%s",
            found.total(),
            told,
            others,
        )

    def _key(self, subject: Subject, measure: str, tokens: Tokens) -> str:
        position = resolve_token(self._asked(tokens), len(tokens))
        return self.store.key(
            subject.model.identity, measure, self.settings.for_measure(measure), tokens, position
        )

    def _recalled(self, subject: Subject, prompts: Iterable[Tokens]) -> Known:
        """What earlier runs have measured of these prompts, measure by measure."""
        known: Known = {}
        for tokens in dict.fromkeys(prompts):
            known[tokens] = {}
            for name in self.settings.measures:
                with contextlib.suppress(
                    CouplingError
                ):  # a token that the prompt does not have: its record says so
                    if (found := self.store.get(self._key(subject, name, tokens))) is not None:
                        known[tokens][name] = registered_measures()[name].cast(found)
        return known

    def _complete(self, known: Known) -> dict[Tokens, PromptCoupling]:
        """Records of the prompts of which nothing is missing."""
        return {
            tokens: self._record(tokens, found)
            for tokens, found in known.items()
            if not self._missing(found)
        }

    def _missing(self, found: Mapping[str, MeasureResult]) -> tuple[str, ...]:
        return tuple(name for name in self.settings.measures if name not in found)

    def _record(self, tokens: Tokens, found: Mapping[str, MeasureResult]) -> PromptCoupling:
        position = resolve_token(self._asked(tokens), len(tokens))
        return PromptCoupling(
            tokens, position, self.settings.ranks, {n: found[n] for n in self.settings.measures}
        )

    def _keep(self, subject: Subject, records: Sequence[PromptCoupling]) -> None:
        """Store what measuring again would find again, at once; memory that ran out may be there the next time."""
        settled = [
            (self._key(subject, name, record.tokens), found)
            for record in records
            for name, found in record.results.items()
            if found.settled
        ]
        try:
            if settled:
                self.store.put(dict(settled))
        except Exception as error:
            if len(records) == 1 or isinstance(
                error, sqlite3.Error
            ):  # of the file, whatever is written to it
                told = "coupling: what was measured of %d prompts could not be stored (%s); it stays in this run's tables"
                logger.warning(told, len(records), error)
                return
            for record in records:  # what is wrong with one is not to cost the others
                self._keep(subject, [record])

    def _measure_missing(
        self, subject: Subject, known: Known, records: dict[Tokens, PromptCoupling]
    ) -> None:
        """Fill ``records``, a few prompts of about the same length at a time, of each only the measures that are missing."""
        batches = self._batches(subject, known)
        waiting = sum(len(batch) for _, batch in batches)
        if batches and not self.quiet:
            batches = _in_order(batches, subject.model.device)
            logger.info(
                "coupling: %s",
                memory_needed(subject.model, [batch for _, batch in batches], self.settings),
            )
        what = "Measuring coupling" + ("" if subject is self.trained else f", {subject.weights}")
        with tqdm(
            total=waiting, desc=what, unit="prompt", disable=self.quiet or not waiting
        ) as bar:
            for number, (settings, batch) in enumerate(batches):
                found = measure_prompts(
                    subject.model, batch, list(map(self._asked, batch)), settings
                )
                self._keep(subject, found)
                records.update({record.tokens: self._with_known(record, known) for record in found})
                bar.update(len(batch))
                if number == 0 and not self.quiet:
                    told = seconds_needed(subject.model, found, waiting - len(found), self.settings)
                    logger.info("coupling: %s", told)

    def try_one(self, prompts: Sequence[Tokens]) -> list[str]:
        """Measure one prompt on each set of weights, and say in a few lines what all of them would cost."""
        told = []
        for subject in self.subjects:
            known = self._recalled(subject, prompts)
            batches = _one_first(self._batches(subject, known))
            told.append(
                f"{subject.weights} weights: {self._counted(prompts, sum(len(batch) for _, batch in batches))}"
            )
            if not batches:
                continue
            settings, batch = batches[0]
            (record,) = measure_prompts(
                subject.model, batch, list(map(self._asked, batch)), settings
            )
            self._keep(subject, [record])
            left = sum(len(batch) for _, batch in batches[1:])
            told.append(seconds_needed(subject.model, [record], left, self.settings))
            told.append(
                memory_needed(subject.model, [batch for _, batch in batches], self.settings)
            )
        return told

    def _with_known(self, record: PromptCoupling, known: Known) -> PromptCoupling:
        found = {**known[record.tokens], **record.results}
        return dataclasses.replace(
            record, results={name: found[name] for name in self.settings.measures}
        )

    def _counted(self, prompts: Sequence[Tokens], waiting: int) -> str:
        distinct = len(set(prompts))
        return f"{len(prompts)} prompts, {distinct} of them distinct, {distinct - waiting} measured before"

    def _batches(self, subject: Subject, known: Known) -> list[tuple[Settings, list[Tokens]]]:
        """Prompts to measure together, with the measures that all of them lack."""
        by_measures: dict[tuple[str, ...], list[Tokens]] = {}
        for tokens, found in known.items():
            if missing := self._missing(found):
                by_measures.setdefault(missing, []).append(tokens)
        batches = []
        for missing, prompts in by_measures.items():
            settings = dataclasses.replace(self.settings, measures=missing)
            batches += [
                (settings, [prompts[i] for i in group])
                for group in groups(subject.model, prompts, settings)
            ]
        return batches


def _in_order(
    batches: list[tuple[Settings, list[Tokens]]], device: torch.device
) -> list[tuple[Settings, list[Tokens]]]:
    """What tells soonest what all cost comes first: one prompt, or on a device, where one takes as long as many, a batch."""
    if device.type == "cpu":
        return _one_first(batches)
    middle = len(batches) // 2
    return [batches[middle], *batches[:middle], *batches[middle + 1 :]]


def _one_first(batches: list[tuple[Settings, list[Tokens]]]) -> list[tuple[Settings, list[Tokens]]]:
    """The same with a prompt of median length alone before the others, to see what one costs."""
    if not batches:
        return []
    middle = len(batches) // 2
    settings, batch = batches[middle]
    at = len(batch) // 2
    others = [(settings, rest)] if (rest := [*batch[:at], *batch[at + 1 :]]) else []
    return [(settings, [batch[at]]), *others, *batches[:middle], *batches[middle + 1 :]]
