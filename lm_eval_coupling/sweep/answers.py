"""Answers that lm-eval has kept of a unit that is not done, so that a stopped one does not score its documents again.

lm-eval's cache knows requests, but neither the weights nor the arguments of the model that answered them: it is kept for one
unit only, only while these are what they were, and no longer than the unit needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.sweep import state as record

_MARK = "scores.json"


def scores_file(folder: Path) -> Path:
    """What lm-eval is told with ``use_cache``: the start of the files' name."""
    return folder / "scores"


def forget_old(folder: Path, note: Mapping[str, Any]) -> None:
    """Remove answers of other weights or settings than those of ``note``, and mark what is to come as of these."""
    about = {"asked": {**note["asked"], "coupling": None}, "source": note["source"]}
    if record.read_json(folder / _MARK) != about:
        forget(folder)
        record.write_json(folder / _MARK, about)


def forget(folder: Path) -> None:
    """Remove all kept answers."""
    for file in [*folder.glob("scores_rank*"), folder / _MARK]:
        file.unlink(missing_ok=True)
