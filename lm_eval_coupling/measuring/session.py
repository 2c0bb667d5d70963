"""What a run measures with: the weights in question, the settings, the store; any number of times, any prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import resolve_token
from lm_eval_coupling.measures.registry import Found, measures
from lm_eval_coupling.measuring.batch import DTYPES
from lm_eval_coupling.measuring.prompt import groups, measure_prompts
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.measuring.store import MeasurementStore
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.saved.tables import TRAINED

logger = logging.getLogger("lm_eval.coupling")  # below lm-eval's own, so that its verbosity and handler apply

Tokens = tuple[int, ...]
Known = dict[Tokens, dict[str, Found]]  # by the name of the measure


@dataclass(frozen=True)
class Subject:
    """Weights whose coupling is measured: ``trained``, those that are scored, or ``untrained``."""

    weights: str
    model: ResidualModel


@dataclass
class Measured:
    """What is known of the prompts that were asked for, by the weights and the prompt's token ids."""

    records: dict[str, dict[Tokens, PromptCoupling]] = field(default_factory=dict)
    reused: set[Tokens] = field(default_factory=set)
    """Prompts whose record of the trained weights comes from the store."""
    interrupted: bool = False

    def of(self, weights: str) -> dict[Tokens, PromptCoupling]:
        """Records of one set of weights."""
        return self.records.setdefault(weights, {})


@dataclass(frozen=True)
class Session:
    """Measures prompts once each: in batches, kept in the store as they are made, found there by later runs."""

    subjects: Sequence[Subject]
    settings: Settings
    position: int
    store: MeasurementStore
    quiet: bool = False
    """Neither a bar nor a word of the cost: one process of several speaks for all."""

    @property
    def trained(self) -> Subject:
        """The weights that are scored."""
        return self.subjects[0]

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
            measured.reused.update(measured.of(TRAINED))
            for subject in self.subjects:
                self._measure_missing(subject, prompts, known[subject.weights], measured.of(subject.weights))
        except KeyboardInterrupt:
            measured.interrupted = True
            done = sum(tokens in measured.of(TRAINED) for tokens in prompts)
            logger.warning("coupling: interrupted, %d of %d prompts are measured and kept", done, len(prompts))
        return measured

    def _key(self, subject: Subject, measure: str, tokens: Tokens) -> str:
        position = resolve_token(self.position, len(tokens))
        return self.store.key(subject.model.identity, measure, self.settings.of(measure), tokens, position)

    def _recalled(self, subject: Subject, prompts: Iterable[Tokens]) -> Known:
        """What earlier runs have measured of these prompts, measure by measure."""
        known: Known = {}
        for tokens in set(prompts):
            known[tokens] = {}
            for name in self.settings.measures:
                with contextlib.suppress(CouplingError):  # a token that the prompt does not have: its record says so
                    if (found := self.store.get(self._key(subject, name, tokens))) is not None:
                        known[tokens][name] = measures()[name].cast(found)
        return known

    def _complete(self, known: Known) -> dict[Tokens, PromptCoupling]:
        """Records of the prompts of which nothing is missing."""
        return {tokens: self._record(tokens, found) for tokens, found in known.items() if not self._missing(found)}

    def _missing(self, found: Mapping[str, Found]) -> tuple[str, ...]:
        return tuple(name for name in self.settings.measures if name not in found)

    def _record(self, tokens: Tokens, found: Mapping[str, Found]) -> PromptCoupling:
        position = resolve_token(self.position, len(tokens))
        return PromptCoupling(tokens, position, self.settings.ranks, {n: found[n] for n in self.settings.measures})

    def _keep(self, subject: Subject, record: PromptCoupling) -> None:
        """Store what measuring again would find again; memory that ran out may be there the next time."""
        settled = {name: found for name, found in record.found.items() if found.settled}
        if not settled:
            return
        try:
            self.store.put({self._key(subject, name, record.tokens): found for name, found in settled.items()})
        except Exception as error:
            logger.warning("coupling: a measurement could not be stored (%s); it stays in this run's tables", error)

    def _measure_missing(
        self, subject: Subject, prompts: Sequence[Tokens], known: Known, records: dict[Tokens, PromptCoupling]
    ) -> None:
        """Fill ``records``, a few prompts of about the same length at a time, of each only the measures that are missing."""
        waiting = list(dict.fromkeys(tokens for tokens in prompts if tokens not in records))
        batches = self._batches(subject, waiting, known)
        if batches:
            self._announce_memory(subject, [tokens for _, tokens in batches])
            self._announce_tokenwise(subject, max(map(len, waiting)))
            batches.insert(0, batches.pop(len(batches) // 2))  # the time announced is that of the median length
        what = "Measuring coupling" + ("" if subject is self.trained else f", {subject.weights}")
        hidden = self.quiet or not prompts
        with tqdm(total=len(prompts), desc=what, disable=hidden, initial=len(prompts) - len(waiting)) as bar:
            for number, (settings, batch) in enumerate(batches):
                start = time.perf_counter()
                for record in measure_prompts(subject.model, batch, self.position, settings):
                    self._keep(subject, record)
                    found = {**known[record.tokens], **record.found}
                    records[record.tokens] = dataclasses.replace(record, found={n: found[n] for n in self.settings.measures})
                bar.update(len(batch))
                if number == 0:
                    self._announce(len(prompts), len(waiting), (time.perf_counter() - start) / len(batch))
            if not batches:
                self._announce(len(prompts), 0, 0.0)

    def _batches(self, subject: Subject, waiting: Sequence[Tokens], known: Known) -> list[tuple[Settings, list[Tokens]]]:
        """Prompts to measure together, with the measures that all of them lack."""
        by_measures: dict[tuple[str, ...], list[Tokens]] = {}
        for tokens in waiting:
            by_measures.setdefault(self._missing(known[tokens]), []).append(tokens)
        found = []
        for missing, prompts in by_measures.items():
            settings = dataclasses.replace(self.settings, measures=missing)
            found += [(settings, [prompts[i] for i in group]) for group in groups(subject.model, prompts, settings)]
        return found

    def _announce(self, prompts: int, waiting: int, seconds: float) -> None:
        if self.quiet or not prompts:
            return
        logger.info(
            "coupling: %d prompts on this process, %d distinct ones not measured before, about %.1f s each",
            *(prompts, waiting, seconds),
        )

    def _announce_memory(self, subject: Subject, batches: list[list[Tokens]]) -> None:
        """What the largest batch takes beside the model."""
        if self.quiet:
            return
        size = {"rank": self.settings.ranks[-1], "itemsize": DTYPES[self.settings.dtype].itemsize}
        needed = (memory_of(subject.model, seq=max(map(len, batch)), prompts=len(batch), **size) for batch in batches)
        logger.info("coupling: measuring takes %s", max(needed, key=lambda memory: memory.total))

    def _announce_tokenwise(self, subject: Subject, longest: int) -> None:
        """What measures over tokens cost, before the first prompt is measured."""
        model = subject.model
        try:
            position = resolve_token(self.position, longest)
            jacobians, megabytes = self.settings.extra(model.n_layers, model.d_model, position)
        except CouplingError:
            return  # tokens that the prompt does not have: its record says so
        if jacobians and not self.quiet:
            logger.info(
                "coupling: measures over tokens take up to %d Jacobians more for a prompt, where the depth takes %d; "
                "%.0f MB of them at a time",
                *(jacobians, model.n_layers, megabytes),
            )
