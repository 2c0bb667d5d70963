"""What a run measures with: the weights in question, the settings, the store; any number of times, any prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.engine import resolve_token
from lm_eval_coupling.measures.tokens import cost
from lm_eval_coupling.measuring.prompt import DTYPES, PromptCoupling, Settings, groups, measure_prompts
from lm_eval_coupling.measuring.rows import TRAINED
from lm_eval_coupling.measuring.store import MeasurementStore
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel

logger = logging.getLogger("lm_eval.coupling")  # below lm-eval's own, so that its verbosity and handler apply

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """Weights whose coupling is measured: ``trained``, those that are scored, or ``untrained``."""

    weights: str
    model: ResidualModel
    fingerprint: str


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
        try:
            for subject in self.subjects:
                measured.of(subject.weights).update(self._recalled(subject, prompts))
            measured.reused.update(measured.of(TRAINED))
            for subject in self.subjects:
                self._measure_missing(subject, prompts, measured.of(subject.weights))
        except KeyboardInterrupt:
            measured.interrupted = True
            done = sum(tokens in measured.of(TRAINED) for tokens in prompts)
            logger.warning("coupling: interrupted, %d of %d prompts are measured and kept", done, len(prompts))
        return measured

    def _key(self, subject: Subject, tokens: Tokens) -> str:
        return self.store.key(subject.fingerprint, self.settings.as_dict(), tokens, self.position)

    def _recalled(self, subject: Subject, prompts: Iterable[Tokens]) -> dict[Tokens, PromptCoupling]:
        """What earlier runs have measured of these prompts."""
        found = {tokens: self.store.get(self._key(subject, tokens)) for tokens in set(prompts)}
        return {tokens: PromptCoupling.from_columns(columns) for tokens, columns in found.items() if columns is not None}

    def _keep(self, subject: Subject, record: PromptCoupling) -> None:
        if record.certificate is None and record.norms is None:
            return
        try:
            self.store.put(self._key(subject, record.tokens), record.to_columns())
        except Exception as error:
            logger.warning("coupling: a measurement could not be stored (%s); it stays in this run's tables", error)

    def _measure_missing(self, subject: Subject, prompts: Sequence[Tokens], known: dict[Tokens, PromptCoupling]) -> None:
        """Fill ``known``, a few prompts of about the same length at a time."""
        waiting = list(dict.fromkeys(tokens for tokens in prompts if tokens not in known))
        batches = groups(subject.model, waiting, self.settings)
        if batches:
            self._announce_memory(subject, batches, waiting)
            self._announce_tokenwise(subject, max(map(len, waiting)))
            batches.insert(0, batches.pop(len(batches) // 2))  # the time announced is that of the median length
        what = "Measuring coupling" + ("" if subject is self.trained else f", {subject.weights}")
        hidden = self.quiet or not prompts
        with tqdm(total=len(prompts), desc=what, disable=hidden, initial=len(prompts) - len(waiting)) as bar:
            for number, batch in enumerate(batches):
                start = time.perf_counter()
                self._measure_batch(subject, [waiting[i] for i in batch], known)
                bar.update(len(batch))
                if number == 0:
                    self._announce(len(prompts), len(waiting), (time.perf_counter() - start) / len(batch))
            if not batches:
                self._announce(len(prompts), 0, 0.0)

    def _measure_batch(self, subject: Subject, prompts: list[Tokens], known: dict[Tokens, PromptCoupling]) -> None:
        for record in measure_prompts(subject.model, prompts, self.position, self.settings):
            known[record.tokens] = record
            self._keep(subject, record)

    def _announce(self, prompts: int, waiting: int, seconds: float) -> None:
        if self.quiet or not prompts:
            return
        logger.info(
            "coupling: %d prompts on this process, %d distinct ones not measured before, about %.1f s each",
            *(prompts, waiting, seconds),
        )

    def _announce_memory(self, subject: Subject, batches: list[list[int]], waiting: list[Tokens]) -> None:
        """What the largest batch takes beside the model."""
        if self.quiet:
            return
        size = {"rank": self.settings.ranks[-1], "itemsize": DTYPES[self.settings.dtype].itemsize}
        needed = (
            memory_of(subject.model, seq=max(len(waiting[i]) for i in batch), prompts=len(batch), **size)
            for batch in batches
        )
        logger.info("coupling: measuring takes %s", max(needed, key=lambda memory: memory.total))

    def _announce_tokenwise(self, subject: Subject, longest: int) -> None:
        """What measures over tokens cost, before the first prompt is measured."""
        model = subject.model
        try:
            position = resolve_token(self.position, longest)
            jacobians, megabytes = cost(model.n_layers, model.d_model, position, self.settings)
        except CouplingError:
            return  # tokens that the prompt does not have: its record says so
        if jacobians and not self.quiet:
            logger.info(
                "coupling: measures over tokens take up to %d Jacobians more for a prompt, where the depth takes %d; "
                "%.0f MB of them at a time",
                *(jacobians, model.n_layers, megabytes),
            )
