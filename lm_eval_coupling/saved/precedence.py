"""The rule for which of several runs of the same weights, prompts and task counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Settings that the numbers of depth coupling depend on. Further measures do not change them.
DEPTH_SETTINGS = ("ranks", "dtype", "method", "depth_version", "position", "prompt")


@dataclasses.dataclass(frozen=True)
class Standing:
    """The extent of what a run has of a task.

    Attributes:
        settings: how coupling was measured; empty where it was not.
        documents: numbers to compare: of measured and scored documents, then of scored ones.
    """

    settings: Mapping[str, Any]
    documents: tuple[float | int, float | int]

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], measured: float | int, scored: float | int
    ) -> Standing:
        """Make a standing; ``scored`` is NaN where a run does not say."""
        scored = 0.0 if math.isnan(scored) else scored
        both = min(measured, scored) if scored else measured
        return cls(settings if measured else {}, (both if measured else scored, scored))


def takes_place(newer: Standing, older: Standing) -> bool:
    """Return whether the newer run counts in place of the older one.

    It does not where only the older one has coupling, nor where the older one holds more documents,
    measured alike, and every measure of the newer: a short trial takes no run's place.
    """
    if bool(newer.settings) != bool(older.settings):
        return bool(newer.settings)
    return newer.documents >= older.documents or not _includes(older.settings, newer.settings)


def _includes(older: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    alike = all(older.get(key) == newer.get(key) for key in DEPTH_SETTINGS)
    return alike and set(newer.get("measures") or ()) <= set(older.get("measures") or ())
