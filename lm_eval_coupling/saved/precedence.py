"""Which of several runs of the same weights, prompts and task counts: the newest, but a short trial takes no run's place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# What the numbers of depth coupling depend on: runs that measured other things besides are not different in these.
DEPTH_SETTINGS = ("ranks", "dtype", "method", "depth_version", "position", "prompt")
DEFAULTS = {"prompt": "scored"}  # of settings that older runs do not have


@dataclasses.dataclass(frozen=True)
class Standing:
    """What a run has of a task.

    Attributes:
        settings: how coupling was measured; empty where it was not.
        documents: what can be compared, those that were measured (and scored); then those that were scored.
    """

    settings: Mapping[str, Any]
    documents: tuple[float, float]

    @classmethod
    def of(cls, settings: Mapping[str, Any], measured: int, scored: float) -> Standing:
        """``scored`` may be NaN, where a run does not say."""
        known = 0.0 if math.isnan(scored) else scored
        both = min(float(measured), known) if known else float(measured)
        return cls(settings if measured else {}, (both if measured else known, known))


def takes_place(newer: Standing, older: Standing) -> bool:
    """Whether the newer run counts in place of the older one.

    Returns:
        False where the older one has coupling and the newer has not, or where it holds more documents, measured alike, and
        every measure of the newer.
    """
    if bool(newer.settings) != bool(older.settings):
        return bool(newer.settings)
    return newer.documents >= older.documents or not _holds(older.settings, newer.settings)


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """One of a run's settings, as it was before runs told it."""
    return settings.get(key, DEFAULTS.get(key))


def _holds(older: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    alike = all(setting(older, key) == setting(newer, key) for key in DEPTH_SETTINGS)
    return alike and set(newer.get("measures", ())) <= set(older.get("measures", ()))
