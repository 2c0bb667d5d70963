"""Answers kept for a unit that is not done, so that a stopped run need not score them again.

lm-eval's cache knows requests, but neither the weights nor the arguments of the model that answered
them. It is kept for one unit, while weights and arguments stay the same, until the unit is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep import state

_MARK = "scores.json"


def scores_file(folder: Path) -> Path:
    """Return the path for lm-eval's ``use_cache``, with which the names of its files begin."""
    return folder / "scores"


def forget_old(folder: Path, note: Mapping[str, Any]) -> None:
    """Remove answers of other weights or settings than those of ``note``, and mark new ones."""
    origin = {"asked": {**note["asked"], "coupling": None}, "source": note["source"]}
    if state.read_json(folder / _MARK) != origin:
        forget(folder)
        state.write_json(folder / _MARK, origin)


def forget(folder: Path) -> None:
    """Remove all kept answers."""
    for file in [*folder.glob("scores_rank*"), folder / _MARK]:
        file.unlink(missing_ok=True)
