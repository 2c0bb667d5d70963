"""Identity of a model's weights, seen without reading them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lm_eval_coupling.sweep.units import Unit

_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".py"}


def source(unit: Unit, environment: Mapping[str, str]) -> str | None:
    """Return words that stay the same while the weights do, or None if nothing is known of them.

    A folder is identified by the names, sizes and times of its files and of its adapter's. A model
    of the hub is identified by the commit that its revision has in this machine's cache.
    """
    folders = [
        Path(unit.model),
        *(Path(str(unit.arguments[key])) for key in ("peft", "delta") if key in unit.arguments),
    ]
    if folders[0].is_dir():
        files = sorted(about for folder in folders if folder.is_dir() for about in _files(folder))
        return "files " + hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    commit = _commit(unit.model, unit.revision, environment)
    return None if commit is None else f"commit {commit}"


def same(first: object, second: object) -> bool:
    """Return whether two sources may be the same; an unknown one may be any."""
    return first is None or second is None or first == second


def snapshot(model: str, revision: str, environment: Mapping[str, str]) -> Path | None:
    """Return the folder of a hub model in this machine's cache, or None if it is not there."""
    commit = _commit(model, revision, environment)
    folder = _cached(model, environment) / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in names if Path(name).suffix in _SUFFIXES):
            try:
                about = file.stat()
            except OSError:  # A link to a file that is gone.
                continue
            yield file.relative_to(folder).as_posix(), about.st_size, int(about.st_mtime)


def _commit(model: str, revision: str, environment: Mapping[str, str]) -> str | None:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if revision.startswith("/") or ".." in revision.split("/"):
        return None
    try:
        text = (_cached(model, environment) / "refs" / revision).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return text.strip() or None


def _cached(model: str, environment: Mapping[str, str]) -> Path:
    """Return the folder in which the hub's client of a unit keeps a model."""
    variables = {**os.environ, **environment}
    home = variables.get("HF_HOME")
    home = home or os.path.join(variables.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.path.expanduser(variables.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    return Path(hub) / f"models--{model.replace('/', '--')}"
