"""Settings of a training, kept beside what it gave, so that nothing of another one is added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.saved.atomic import writing


def require_same(file: Path, recipe: Mapping[str, Any], what: str) -> None:
    """Refuse a folder whose recipe is another one; a folder without a recipe is new.

    Args:
        file: the recipe in JSON.
        recipe: settings that change what is made.
        what: what the folder holds, such as "a training".

    Raises:
        CouplingError: if the recipe differs or cannot be read.
    """
    if not file.exists():
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, which cannot be read ({why(error)}), expected the settings of {what}; "
            "choose another --out"
        ) from None
    if earlier != recipe:
        raise CouplingError(
            f"got {file.parent}, {what} of other data or settings (see {file}); choose another "
            "--out"
        )


def write(file: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe, in whole or not at all."""
    with writing(file) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def digest_of(file: Path) -> str:
    """Return 16 hex digits of a file's content, or "" for a file that cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:  # explained by whoever reads its texts
        return ""
