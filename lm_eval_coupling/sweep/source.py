"""The state of a model's weights, seen without reading them: a changed model is another model under the same name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from lm_eval_coupling.sweep.units import Unit

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.json", "*.model", "*.txt", "*.py")


def source(unit: Unit, environment: Mapping[str, str]) -> str | None:
    """What tells one state of the weights from another, or None where nothing is known of them here.

    A folder is known by the names, sizes and times of its files (and of its adapter's), a model of the hub by the commit
    that its revision stands for in this machine's cache.

    Returns:
        Words that are the same as long as the weights are.
    """
    folders = [
        Path(unit.model),
        *(Path(str(unit.arguments[key])) for key in ("peft", "delta") if key in unit.arguments),
    ]
    if folders[0].is_dir():
        return "files " + _files([folder for folder in folders if folder.is_dir()])
    commit = _commit(unit.model, unit.revision, environment)
    return None if commit is None else f"commit {commit}"


def same(one: str | None, other: str | None) -> bool:
    """Whether two sources may be the same; what is not known may."""
    return one is None or other is None or one == other


def snapshot(model: str, revision: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of a hub model in this machine's cache, if it is there."""
    commit = _commit(model, revision, environment)
    folder = _cached(model, environment) / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def _files(folders: list[Path]) -> str:
    found = [
        (file.relative_to(folder).as_posix(), file.stat().st_size, int(file.stat().st_mtime))
        for folder in folders
        for pattern in _WEIGHTS
        for file in folder.rglob(pattern)
    ]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def _commit(model: str, revision: str, environment: Mapping[str, str]) -> str | None:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        return (_cached(model, environment) / "refs" / revision).read_text().strip() or None
    except OSError:
        return None


def _cached(model: str, environment: Mapping[str, str]) -> Path:
    """Where the hub's client keeps a model, by the variables that a unit will see."""
    variables = {**os.environ, **environment}
    home = (
        variables.get("HF_HOME")
        or Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    hub = Path(variables.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return hub / f"models--{model.replace('/', '--')}"
