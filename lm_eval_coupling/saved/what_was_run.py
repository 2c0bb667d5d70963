"""The identity of a run: what decides the numbers of one of its tasks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class WhatWasRun:
    """The weights, prompts and answers that decide the scores and coupling of one task.

    Attributes:
        model: name or path.
        revision: of the model on the hub, ``main`` where there is none.
        variant: further arguments that make other weights, such as ``peft=…``.
        dtype: that the model ran in, "" if unknown.
        fingerprint: of the weights; None where only scores were taken.
        task: name of a task or group.
        prompting: how prompts and answers were made, and of which documents where runs differ in
            them (:mod:`.prompting`).
    """

    model: str
    revision: str
    variant: str
    dtype: str
    fingerprint: str | None
    task: str
    prompting: str

    @property
    def weights(self) -> tuple[str | None, ...]:
        """The fields that tell weights apart; runs that differ in one are of different models."""
        return self.model, self.revision, self.variant, self.dtype, self.fingerprint

    def differences(self, other: WhatWasRun) -> dict[str, tuple[str, str]]:
        """Return the names of the fields that differ, with both values."""
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        }
        return {name: (str(a), str(b)) for name, (a, b) in pairs.items() if a != b}
